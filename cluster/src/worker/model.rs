//! The model of a worker: loaded once, whatever roles the worker has afterwards.

use std::ops::ControlFlow;
use std::sync::Arc;

use anyhow::Result;
use kimi_linear::backend::{self, Backend, Device, Parallelism, host_memory};
use kimi_linear::checkpoint::ModelFiles;
use kimi_linear::engine::{EngineHandle, EngineOptions, EngineSizes, MemoryPlanner};
use kimi_linear::llm::{Llm, LlmFiles, LlmOptions};
use kimi_linear::server::SamplingDefaults;

use super::grammars::GrammarCache;
use super::options::Options;

/// A loaded model with its engine.
pub(super) struct Model {
    pub(super) engine: EngineHandle,
    pub(super) grammars: GrammarCache,
    /// Tokens that end an answer.
    pub(super) stop_ids: Vec<u32>,
    /// Sampling parameters of requests that set none; only other frontends send such requests.
    pub(super) defaults: SamplingDefaults,
    /// Maximum tokens of a prompt and its answer together.
    pub(super) context: usize,
    pub(super) sizes: EngineSizes,
}

impl Model {
    /// Loads the model. It blocks, for minutes where the model is large.
    ///
    /// # Errors
    /// Files that are missing, damaged or of another model, or a device that is missing or too small.
    pub(super) fn load(options: &Options) -> Result<Self> {
        let mut files = LlmFiles::open(&options.model.path()?)?;
        files.quantize = options.model.quantize;
        let defaults = defaults(&files.files)?;
        let stop_ids = stop_ids(&files, &defaults);
        let tokenizer = Arc::clone(&files.tokenizer);
        let grammars = GrammarCache::new(tokenizer, files.config.vocab_size, &stop_ids)?;
        let backend = backend::open(options.model.backend(), options.model.device)?;
        let llm_options = llm_options(options, &files, backend.device())?;
        let llm = load(files, backend, &llm_options)?;
        let (device, context, sizes) = (llm.device(), llm.context(), llm_options.sizes);
        tracing::info!(
            backend = device.backend,
            device = device.name,
            context,
            sequences = sizes.sequences,
            blocks = sizes.blocks,
            "the model is loaded"
        );
        let (_, engine) = llm.into_parts();
        Ok(Self {
            engine,
            grammars,
            stop_ids,
            defaults,
            context,
            sizes,
        })
    }
}

fn defaults(files: &ModelFiles) -> Result<SamplingDefaults> {
    // A GGUF has no such file.
    let ModelFiles::Folder(folder) = files else {
        return Ok(SamplingDefaults::default());
    };
    Ok(SamplingDefaults::from_folder(folder)?.unwrap_or_default())
}

/// Tokens that end an answer: those of the tokenizer, of `config.json` and of `generation_config.json`, as a server has them.
fn stop_ids(files: &LlmFiles, defaults: &SamplingDefaults) -> Vec<u32> {
    let mut ids = files.stop_ids();
    let vocabulary = files.config.vocab_size;
    let more = defaults.eos_token_ids.iter().copied();
    ids.extend(more.filter(|id| (*id as usize) < vocabulary));
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// The sizes that fit the device.
fn llm_options(options: &Options, files: &LlmFiles, device: &Device) -> Result<LlmOptions> {
    let engine = &options.engine;
    let planner = MemoryPlanner {
        sequences: engine.max_num_seqs,
        context: engine.context(&files.config)?,
        prefill_chunk: engine.prefill_chunk()?,
        checkpoints: engine.checkpoints(),
        blocks: engine.num_gpu_blocks_override,
        speculative: 0,
        memory: device.memory_bytes.map(|bytes| engine.part(bytes)),
        weights: files.checkpoint()?.total_bytes(),
        degrees: Parallelism::SINGLE,
        cache: engine.cache().unwrap_or(device.cache),
    };
    let sizes = planner.sizes(&files.config)?;
    // On a CPU the model and the swap space share the host's memory; with a GPU the swap space has all of it.
    let left = match device.backend {
        "cpu" => planner.left(&files.config, &sizes),
        _ => host_memory().map(|memory| engine.part(memory)),
    };
    let wanted = engine.swap_bytes();
    Ok(LlmOptions {
        sizes,
        cache: engine.cache(),
        engine: EngineOptions {
            host_bytes: left.map_or(wanted, |left| wanted.min(left)),
            queue: engine.max_queue,
            ..EngineOptions::default()
        },
    })
}

/// Loads the weights, with a line in the log for each tenth.
fn load(files: LlmFiles, backend: Box<dyn Backend>, options: &LlmOptions) -> Result<Llm> {
    let mut told = 0;
    let llm = files.load(backend, options, &mut |done, total| {
        let tenth = done * 10 / total.max(1);
        if tenth > told {
            told = tenth;
            tracing::info!("loading: {} of {} MB", done / 1_000_000, total / 1_000_000);
        }
        ControlFlow::Continue(())
    })?;
    Ok(llm)
}
