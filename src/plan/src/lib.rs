//! Prefill-as-a-Service (PrfaaS, arXiv 2604.15039): which requests are prefilled in another datacenter, when, and how many
//! nodes have which role.
//!
//! A prefill cluster of fast GPUs computes the caches of long prompts and sends them over an ordinary network to a local
//! cluster, which runs the short prompts' prefill (PD-P) and every decode (PD-D). From the bottom:
//!
//! - [`profile`]: seconds and bytes of a prefill by its length, as data; [`lengths`]: a distribution of uncached prompt
//!   lengths.
//! - [`model`]: the paper's equations (1) to (6); [`search`]: (7) and (8) by grid search.
//! - [`route`]: the cluster of one request; [`scheduler`]: the short and the long timescale. Time and counters are passed in:
//!   the same types are for a production router and for the replay.
//! - [`trace`]: requests of Mooncake's and Azure's traces, or generated; [`replay`]: all of it in virtual time.
//! - [`plan`], [`fit`] (a plan for a trace), [`compare`] and [`report`]: the results for users.
//! - [`burst`]: KunServe (arXiv 2412.18169), which is independent of the others: replicas drop duplicated parameters when
//!   caches need the memory.
//!
//! The crate uses no device types and none of the engine's. Results are those of a model, as the paper's tables are.

pub mod burst;
pub mod compare;
mod curve;
mod error;
pub mod fit;
pub mod lengths;
pub mod model;
pub mod plan;
pub mod profile;
pub mod replay;
pub mod report;
pub mod route;
pub mod scheduler;
pub mod search;
pub mod trace;

pub use error::{Error, Result};
