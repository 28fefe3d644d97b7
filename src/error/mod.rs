//! Every way in which the library can refuse, as types.
//!
//! One enum per module, one file per enum; [`Error`] is their union. A message says what was expected, what was found and
//! where (file, tensor, field). Programs print it and exit with 1. It is not a place for recovery: an error is handled
//! once, by the caller that can do something about it.

mod backend;
mod cache;
mod checkpoint;
mod config;
mod demo;
mod engine;
mod quantize;
mod tokenizer;
#[cfg(feature = "transfer")]
mod transfer;

pub use backend::{BackendError, Scope};
pub use cache::CacheError;
pub use checkpoint::CheckpointError;
pub use config::ConfigError;
pub use demo::DemoError;
pub use engine::EngineError;
pub use quantize::QuantizeError;
pub use tokenizer::TokenizerError;
#[cfg(feature = "transfer")]
pub use transfer::{Refusal, TransferError};

/// Any error of the library.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The configuration cannot be read or does not describe a model that this runtime computes.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The weights are missing, damaged or not those that the configuration describes.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The tokenizer, the chat template or the text given to them.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The device, or what was asked of it.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// A snapshot.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The demo model's files.
    #[error(transparent)]
    Demo(#[from] DemoError),
    /// A quantised model that was to be written.
    #[error(transparent)]
    Quantize(#[from] QuantizeError),
    /// A request, or what the model made of it.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Caches that came from another process, or went to one.
    #[cfg(feature = "transfer")]
    #[error(transparent)]
    Transfer(#[from] TransferError),
    /// A request failed in the engine; other requests may have got the same error.
    #[error(transparent)]
    Failed(std::sync::Arc<Error>),
    /// Loading a model was stopped by its caller.
    #[error("loading the model was stopped")]
    LoadStopped,
}

impl Error {
    /// Whether a request, a step or the device failed.
    #[must_use]
    pub fn scope(&self) -> Scope {
        match self {
            Self::Backend(error) | Self::Engine(EngineError::Trace(error)) => error.scope(),
            Self::Failed(error) => error.scope(),
            _ => Scope::Request,
        }
    }
}
