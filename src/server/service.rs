//! The loaded model, as request handlers use it.

use std::sync::{Arc, Mutex, PoisonError};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::error::{ApiError, Result};
use super::fields::shorten;
use super::grammar::Grammars;
use super::listen::ServedModel;
use super::metrics::Metrics;
use super::options::ServerOptions;
use super::responses::Store;
use crate::backend::Device;
use crate::connector::Connector;
use crate::engine::{EngineClient, Request};
use crate::error::TokenizerError;
use crate::tokenizer::{ChatTemplate, Tokenizer};

/// A running engine with its tokenizer and chat template.
pub(super) struct Service {
    model: ServedModel,
    stop_ids: Vec<u32>,
    grammars: Grammars,
    /// Limits how many prompts are rendered and encoded at the same time, which takes CPU time from the engine.
    encoders: Semaphore,
    /// Limits how many large bodies are read or encoded at the same time, which takes memory and CPU time from other requests.
    large: Semaphore,
    seeds: Option<Mutex<ChaCha8Rng>>,
    connector: Option<Connector>,
    /// Stored responses, for `previous_response_id`.
    pub(super) responses: Store,
    /// Seconds since 1970 when it was made.
    pub(super) created: u64,
    pub(super) options: Arc<ServerOptions>,
    pub(super) metrics: Arc<Metrics>,
}

/// Maximum number of prompts that are encoded at the same time.
const ENCODERS: usize = 4;

/// Bodies of at least so many bytes are large.
const LARGE: usize = 256 << 10;

impl Service {
    /// A service for a model, with the connector of its cache transfers if configured. Without a template chats are refused.
    ///
    /// # Errors
    /// A vocabulary that grammars cannot be compiled for.
    pub(super) fn new(
        model: ServedModel,
        connector: Option<Connector>,
        options: Arc<ServerOptions>,
        metrics: Arc<Metrics>,
    ) -> std::result::Result<Self, TokenizerError> {
        let files = &model.files;
        let mut stop_ids = files.stop_ids();
        let vocabulary = files.tokenizer.vocab_size();
        let more = options.sampling_defaults.eos_token_ids.iter().copied();
        stop_ids.extend(more.filter(|id| (*id as usize) < vocabulary));
        stop_ids.sort_unstable();
        stop_ids.dedup();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Ok(Self {
            grammars: Grammars::new(&files.tokenizer, files.config.vocab_size, &stop_ids)?,
            model,
            stop_ids,
            encoders: Semaphore::new(ENCODERS),
            large: Semaphore::new(1),
            seeds: options
                .seed
                .map(|seed| Mutex::new(ChaCha8Rng::seed_from_u64(seed))),
            connector,
            responses: Store::default(),
            created: now.map_or(0, |since| since.as_secs()),
            options,
            metrics,
        })
    }

    pub(super) fn engine(&self) -> &Arc<dyn EngineClient> {
        &self.model.engine
    }

    /// The device that it runs on, if that is one of this machine.
    pub(super) fn device(&self) -> Option<&Device> {
        self.model.device.as_ref()
    }

    /// The connector of its cache transfers, if configured.
    pub(super) fn connector(&self) -> Option<&Connector> {
        self.connector.as_ref()
    }

    pub(super) fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.model.files.tokenizer
    }

    pub(super) fn template(&self) -> Result<&ChatTemplate> {
        let none = || {
            ApiError::invalid("this model has no chat template; use /v1/completions")
                .code("no_chat_template")
        };
        self.model.files.template.as_ref().ok_or_else(none)
    }

    /// Maximum tokens of a prompt and its answer together.
    pub(super) fn context(&self) -> usize {
        self.model.context
    }

    pub(super) fn vocabulary(&self) -> usize {
        self.model.files.config.vocab_size
    }

    pub(super) fn stop_ids(&self) -> &[u32] {
        &self.stop_ids
    }

    pub(super) fn grammars(&self) -> &Grammars {
        &self.grammars
    }

    /// The model's own name.
    pub(super) fn name(&self) -> &str {
        self.options
            .model_names
            .first()
            .map_or("kimi-linear", String::as_str)
    }

    pub(super) fn check_model(&self, name: &str) -> Result<()> {
        if self.options.model_names.iter().any(|own| own == name) {
            return Ok(());
        }
        let message = format!(
            "there is no model `{}` here; there is `{}`",
            shorten(name),
            self.name()
        );
        Err(ApiError::not_found(message)
            .param("model")
            .code("model_not_found"))
    }

    /// A seed for a request without one.
    pub(super) fn next_seed(&self) -> u64 {
        match &self.seeds {
            Some(seeds) => seeds
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .random(),
            None => rand::random(),
        }
    }

    /// A request with this server's settings, which may share cached prefixes or not.
    pub(super) fn request(&self, prompt: Vec<u32>, max_tokens: usize, share: bool) -> Request {
        Request {
            reuse: self.options.prefix_caching && share,
            ..Request::new(prompt, max_tokens)
        }
    }

    /// For a body large enough to be limited, waits until no other one is read or encoded, and returns the permit that keeps others
    /// waiting.
    pub(super) async fn alone(&self, bytes: usize) -> Result<Option<SemaphorePermit<'_>>> {
        let stopped = |_| ApiError::internal("the server is stopping");
        match bytes > LARGE {
            true => self.large.acquire().await.map(Some).map_err(stopped),
            false => Ok(None),
        }
    }

    /// Runs CPU-bound work outside of the threads that serve connections, a few tasks at a time.
    pub(super) async fn compute<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let stopped = |_| ApiError::internal("the server is stopping");
        let permit = self.encoders.acquire().await.map_err(stopped)?;
        let service = Arc::clone(self);
        let done = tokio::task::spawn_blocking(move || work(&service)).await;
        drop(permit);
        match done {
            Ok(done) => done,
            // The program ends, and the tasks that wait for this are dropped with it.
            Err(error) if error.is_cancelled() => std::future::pending().await,
            Err(_) => Err(ApiError::internal("the request could not be read")),
        }
    }
}
