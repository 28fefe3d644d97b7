//! A frontend: this program's HTTP server over Dynamo's routed engine.
//!
//! `serve.rs` is its life. Requests go from our server to [`routed`], which speaks token ids with Dynamo's pipelines ([`backends`]); Dynamo's
//! own HTTP server, whose preprocessor reads control tokens in users' texts, is not started (`dynamo.rs`). [`discovery`] follows the workers,
//! and lets the router know those whose answers get here ([`probe`]). [`telemetry`] reads what workers tell for [`crate::policy`], [`convert`]
//! carries out the changes of roles that it orders, and [`status`] shows all of it.

pub mod backends;
pub mod convert;
pub mod discovery;
mod dynamo;
mod exposition;
mod flags;
mod http_flags;
pub mod probe;
pub mod routed;
mod serve;
pub mod status;
pub mod telemetry;
pub mod totals;

pub use flags::Options;
pub use serve::run;
