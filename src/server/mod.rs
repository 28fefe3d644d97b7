//! An HTTP server for OpenAI's clients, built on the engine.
//!
//! A request is checked (`fields.rs`, `parameters.rs`), converted to ids (`prompt.rs`), submitted to the engine, and its
//! outputs are converted to a response or a stream of server-sent events (`response.rs`), in the JSON of `chat.rs` or
//! `completions.rs`. The engine decides which requests run; `answers.rs` submits and cancels them. TLS is left to a reverse
//! proxy.
//!
//! If one server prefills a prompt and another answers it, `kv_transfer.rs` moves the caches between them.

mod answers;
mod auth;
mod chat;
mod completions;
mod error;
mod fields;
mod gate;
mod grammar;
mod kv_config;
mod kv_export;
mod kv_import;
mod kv_metrics;
mod kv_params;
mod kv_transfer;
mod listen;
mod logprobs;
mod metrics;
mod options;
mod page;
mod parameters;
mod prompt;
mod request_id;
mod response;
mod routes;
mod service;
mod stream;
mod tokens;
mod tools;
mod usage;

pub use kv_config::KvConfigError;
pub use kv_transfer::{KvTransfer, KvTransfers, LoadFailure};
pub use listen::{Opener, Server};
pub use options::{Origins, ServerOptions};
