//! A worker: this program's engine behind Dynamo's `LLMEngine`.
//!
//! `roles.rs` runs it: one runtime and one loaded model for as long as the process lives, and one of Dynamo's workers after the other, each
//! in one role. `engine.rs` is what such a worker asks; `generate.rs` decides where a request's prompt is computed (here, here for a decode
//! worker, or by a prefill worker), and `answer.rs` is the response stream. `events.rs` and `metrics.rs` tell the router what is cached and
//! how loaded the worker is; `foreign.rs` reads requests of Dynamo's own frontends.

mod answer;
mod counts;
mod engine;
mod events;
mod foreign;
mod generate;
mod grammars;
mod metrics;
mod model;
mod options;
mod parameters;
mod roles;
mod shared;

pub use engine::WorkerEngine;
pub use options::Options;
pub use roles::run;
pub use shared::Shared;
