//! The library's main interface: open a model's files, load it onto a device, generate.
//!
//! [`Llm`] is an engine in a thread of its own, with its tokenizer and chat template. [`Llm::engine`] gives access to the
//! engine itself, for events, traces and concurrent requests.

#[cfg(not(target_arch = "wasm32"))]
mod generation;

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

#[cfg(not(target_arch = "wasm32"))]
pub use generation::{Completion, Generation, Piece, Prompt, Stream};

#[cfg(not(target_arch = "wasm32"))]
use crate::backend::{self, BackendKind};
use crate::backend::{Backend, Device};
#[cfg(not(target_arch = "wasm32"))]
use crate::cache::Snapshot;
use crate::checkpoint::{Checkpoint, ModelFiles, Preset};
use crate::config::{Dtype, ModelConfig};
use crate::demo;
use crate::engine::{BLOCK_TOKENS, Engine, EngineHandle, EngineOptions, EngineSizes};
#[cfg(not(target_arch = "wasm32"))]
use crate::engine::{Event, PromptScores, Request, Score};
use crate::error::{EngineError, Error, TokenizerError};
use crate::model::{Limits, Model};
use crate::quantize;
use crate::tokenizer::{ChatTemplate, Tokenizer};

/// Default context length in tokens.
pub const CONTEXT: usize = 32_768;

/// The files of a model, opened and checked. No weights have been read.
pub struct LlmFiles {
    /// The files.
    pub files: ModelFiles,
    /// The configuration.
    pub config: ModelConfig,
    /// The tokenizer, limited to ids that the model has a row for.
    pub tokenizer: Arc<Tokenizer>,
    /// The chat template; `None` if the model has none, so that chats are refused.
    pub template: Option<ChatTemplate>,
    /// The formats that weights are quantised to while they are loaded; `None` for those of the files.
    pub quantize: Option<Preset>,
}

/// How a model is loaded.
#[derive(Clone, Copy, Debug)]
pub struct LlmOptions {
    /// Sizes of the engine: running sequences, context, checkpoints.
    pub sizes: EngineSizes,
    /// The dtype of the latent cache; `None` for the device's default.
    pub cache: Option<Dtype>,
    /// Options of the engine.
    pub engine: EngineOptions,
}

impl LlmOptions {
    /// One sequence at a time, of up to `context` tokens, which can be scored ([`Llm::score`]).
    #[must_use]
    pub fn one(context: usize) -> Self {
        Self {
            sizes: EngineSizes {
                scored: BLOCK_TOKENS,
                ..EngineSizes::one(context)
            },
            cache: None,
            engine: EngineOptions::default(),
        }
    }
}

impl LlmFiles {
    /// Opens a folder with `config.json`, the tokenizer's files and safetensors weights, or a GGUF.
    ///
    /// # Errors
    /// Files that are missing, damaged, or of another model.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let files = ModelFiles::open(path)?;
        let config = files.config()?;
        let mut tokenizer = Tokenizer::from_files(&files)?;
        tokenizer.limit_ids(config.vocab_size)?;
        let template = match ChatTemplate::from_files(&files) {
            Ok(template) => Some(template),
            Err(TokenizerError::NoTemplate { .. }) => None,
            Err(error) => return Err(error.into()),
        };
        Ok(Self {
            files,
            config,
            tokenizer: Arc::new(tokenizer),
            template,
            quantize: None,
        })
    }

    /// The weights as they are loaded.
    ///
    /// # Errors
    /// As for [`Checkpoint::open`], and weights that are quantised already, where they are to be quantised.
    pub fn checkpoint(&self) -> Result<Checkpoint, Error> {
        let checkpoint = self.files.checkpoint(&self.config)?;
        match self.quantize {
            Some(preset) => quantize::while_loading(checkpoint, &self.config, preset),
            None => Ok(checkpoint),
        }
    }

    /// Opens the demo model, which is part of the library.
    ///
    /// # Errors
    /// A system without a folder to unpack it to.
    pub fn demo() -> Result<Self, Error> {
        Self::open(&demo::folder()?)
    }

    /// Tokens that end an answer.
    #[must_use]
    pub fn stop_ids(&self) -> Vec<u32> {
        self.tokenizer.stop_ids(&self.config.eos_token_ids)
    }

    /// The chat template.
    ///
    /// # Errors
    /// A model without one.
    pub fn template(&self) -> Result<&ChatTemplate, Error> {
        self.template.as_ref().ok_or_else(|| {
            let dir = self.files.path().to_owned();
            TokenizerError::NoTemplate { dir }.into()
        })
    }

    /// Loads the weights onto a device and starts the engine. `progress` receives the number of bytes loaded so far and in
    /// total; it cancels loading by breaking.
    ///
    /// # Errors
    /// Damaged weights, a device without enough memory, or cancelled loading.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn load(
        self,
        backend: Box<dyn Backend>,
        options: &LlmOptions,
        progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
    ) -> Result<Llm, Error> {
        let checkpoint = self.checkpoint()?;
        let (device, limits) = plan(&*backend, options);
        let total = checkpoint.total_bytes();
        let mut progress = |done| progress(done, total);
        let model = Model::load_while(&self.config, &checkpoint, backend, limits, &mut progress)?;
        self.run(model, device, options)
    }

    /// Loads the weights onto a device, reading each when it is its turn, and starts the engine. `progress` receives the number
    /// of bytes loaded so far and in total; it cancels loading by breaking.
    ///
    /// # Errors
    /// Files that cannot be read or are damaged, a device without enough memory, or cancelled loading.
    #[cfg(target_arch = "wasm32")]
    pub async fn load(
        self,
        backend: Box<dyn Backend>,
        options: &LlmOptions,
        progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
    ) -> Result<Llm, Error> {
        let (checkpoint, _) = crate::files::reading(|| self.checkpoint()).await?;
        let (device, limits) = plan(&*backend, options);
        let total = checkpoint.total_bytes();
        let mut progress = |done| progress(done, total);
        let model =
            Model::load_while(&self.config, &checkpoint, backend, limits, &mut progress).await?;
        self.run(model, device, options)
    }

    fn run(self, model: Model, device: Device, options: &LlmOptions) -> Result<Llm, Error> {
        let engine =
            Engine::new(model, options.engine).suppress_tokens(self.tokenizer.unused_ids());
        let context = engine.context().min(options.sizes.context);
        Ok(Llm {
            files: self,
            engine: start(engine)?,
            device,
            context,
        })
    }
}

/// The device, and the sizes of a model on it.
fn plan(backend: &dyn Backend, options: &LlmOptions) -> (Device, Limits) {
    let device = backend.device().clone();
    let limits = options.sizes.limits(options.cache.unwrap_or(device.cache));
    (device, limits)
}

#[cfg(not(target_arch = "wasm32"))]
fn start(engine: Engine) -> Result<EngineHandle, EngineError> {
    EngineHandle::start(engine).map_err(|error| EngineError::NoThread {
        reason: error.to_string(),
    })
}

#[cfg(target_arch = "wasm32")]
fn start(engine: Engine) -> Result<EngineHandle, EngineError> {
    Ok(EngineHandle::start(engine))
}

/// A loaded model with its engine.
///
/// Dropping it cancels its requests.
pub struct Llm {
    files: LlmFiles,
    engine: EngineHandle,
    device: Device,
    context: usize,
}

impl Llm {
    /// The engine: requests, events, traces.
    #[must_use]
    pub fn engine(&self) -> &EngineHandle {
        &self.engine
    }

    /// Its files and its engine.
    #[must_use]
    pub fn into_parts(self) -> (LlmFiles, EngineHandle) {
        (self.files, self.engine)
    }

    /// Its configuration, tokenizer and chat template.
    #[must_use]
    pub fn files(&self) -> &LlmFiles {
        &self.files
    }

    /// The device that it runs on.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Maximum tokens of a prompt and its answer together.
    #[must_use]
    pub fn context(&self) -> usize {
        self.context
    }
}

#[cfg(not(target_arch = "wasm32"))]
impl Llm {
    /// Opens a folder or a GGUF and loads it: onto a GPU if there is one, otherwise the CPU, for one sequence of up to 32K
    /// tokens at a time. Use [`LlmFiles::load`] for other options.
    ///
    /// # Errors
    /// Those of [`LlmFiles::open`] and [`LlmFiles::load`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        Self::of(LlmFiles::open(path.as_ref())?)
    }

    /// Opens and loads the demo model.
    ///
    /// # Errors
    /// Those of [`LlmFiles::demo`] and [`LlmFiles::load`].
    pub fn demo() -> Result<Self, Error> {
        Self::of(LlmFiles::demo()?)
    }

    fn of(files: LlmFiles) -> Result<Self, Error> {
        let backend = backend::open(BackendKind::Auto, None)?;
        let options = LlmOptions::one(CONTEXT.min(files.config.model_max_length));
        files.load(backend, &options, &mut |_, _| ControlFlow::Continue(()))
    }

    /// Scores a text: the sum of the negative log-likelihoods of its tokens after the first, in nats.
    ///
    /// # Errors
    /// An empty text or one longer than the context, or a device that fails.
    pub fn score(&self, text: &str) -> Result<Score, Error> {
        let answer = self.engine.answer(Request {
            scores: PromptScores::Likelihoods,
            ..Request::new(self.files.tokenizer.encode_ordinary(text)?, 0)
        });
        let mut score = Score::default();
        while let Some(event) = answer.next() {
            match event {
                Event::Scored(scored) => score.add(&scored),
                Event::Failed(error) => return Err(Error::Failed(error)),
                Event::Finished { .. } => return Ok(score),
                _ => {}
            }
        }
        Err(EngineError::Stopped.into())
    }

    /// Takes a snapshot of the caches of these tokens, to save in a file or pass to another process ([`Snapshot::save`],
    /// [`Snapshot::load`]).
    ///
    /// # Errors
    /// Tokens without a cached checkpoint, or a device that fails.
    pub fn snapshot(&self, tokens: Vec<u32>) -> Result<Snapshot, Error> {
        self.engine.snapshot(tokens)
    }

    /// Restores a snapshot: prompts that begin with its tokens continue from it.
    ///
    /// # Errors
    /// A snapshot of another model or larger than the host memory allowed, or a device that fails.
    pub fn restore(&self, snapshot: Snapshot) -> Result<(), Error> {
        self.engine.restore(snapshot)
    }
}
