//! Prefill-as-a-Service (PrfaaS, arXiv 2604.15039): which requests leave the datacenter for their prefill, when, and how many
//! nodes do what.
//!
//! A prefill cluster of strong GPUs fills the caches of long prompts and ships them over an ordinary network to a local cluster, which
//! runs the short prompts' prefill (PD-P) and every decode (PD-D). From the bottom:
//!
//! - [`profile`]: seconds and bytes of a prefill by its length, as data; [`lengths`]: a distribution of uncached prompt lengths.
//! - [`model`]: the paper's equations (1) to (6); [`search`]: (7) and (8) by grid search.
//! - [`route`]: where one request goes; [`scheduler`]: the short and the long timescale over it. Time and counters are passed in: the
//!   same types serve a production router and the replay.
//! - [`trace`]: requests of Mooncake's and Azure's traces, or generated; [`replay`]: all of it in virtual time.
//! - [`plan`], [`fit`] (a plan for a trace), [`compare`] and [`report`]: what a person reads.
//! - [`burst`]: KunServe (arXiv 2412.18169), which stands beside all this: replicas drop duplicated parameters when caches need their
//!   room.
//!
//! There are no device types here and none of the engine's. Whatever comes out is a model's output, as the paper's tables are.

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
