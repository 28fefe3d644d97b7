//! An HTTP server that OpenAI's and Anthropic's clients understand: one more client of the engine.
//!
//! A request is read into types and checked (`fields.rs`, `parameters.rs`), turned into ids (`prompt.rs`), given to the engine,
//! and the outputs are turned into an answer or a stream of server-sent events (`response.rs`), in the JSON of `chat.rs`,
//! `completions.rs`, `responses/` or `anthropic/`. Who runs and who waits is the engine's decision; here it is only told
//! (`answers.rs`). Connections come over TCP or a Unix socket, with TLS if it is configured (`listen.rs`).
//!
//! If one server prefills a prompt and another answers it, a [`Connector`](crate::connector::Connector) moves the caches
//! between them. The engine is an [`EngineClient`](crate::engine::EngineClient): it may be in other processes.

mod answers;
mod anthropic;
mod auth;
mod chat;
mod chat_request;
mod choices;
mod completions;
mod error;
mod fields;
mod format;
mod gate;
mod gbnf;
mod grammar;
mod http_tls;
mod kv_metrics;
mod kv_params;
mod listen;
mod logprobs;
mod metrics;
mod openapi;
mod options;
mod origin;
mod page;
#[cfg(feature = "data-parallel")]
mod parameter_metrics;
mod parameters;
mod prompt;
mod reasoning;
mod request_id;
mod response;
mod responses;
mod routes;
mod sampling_defaults;
mod schema;
mod schema_check;
mod schema_refs;
mod service;
#[cfg(unix)]
mod socket;
mod status;
mod stream;
mod strict;
mod structural_tag;
mod text_or;
mod tokens;
mod tools;
mod usage;

pub use grammar::Grammars;
pub use http_tls::{ClientCertificates, HttpTls, HttpTlsError, HttpTlsFiles};
pub use listen::{Opener, ServedModel, Server};
pub use options::{Origins, ServerOptions};
pub use reasoning::ReasoningParser;
pub use sampling_defaults::{SamplingDefaults, SamplingDefaultsError};
