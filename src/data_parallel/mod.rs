//! Several replicas of a model in one process, each an engine with its own scheduler, sequences and prefix cache, behind one
//! [`EngineClient`](crate::engine::EngineClient).
//!
//! `client.rs` sends each request to the least loaded replica (`load.rs`), and `answering.rs` has its answers go on at another one if
//! its own is lost. All replicas have the same parameters: under a burst a group of them can drop duplicates and use their memory
//! for caches. `homes.rs` says where each replica computes each layer, and `sizes.rs` how many slots and blocks that leaves.
//! `groups.rs` has the engines change, one layer at a time, and `controller.rs` decides when.
//! In a `pair` the two replicas are in processes of their own.

mod answering;
mod client;
mod controller;
mod groups;
mod homes;
mod load;
mod members;
mod open;
#[cfg(feature = "transfer")]
mod pair;
mod sizes;
mod state;
mod told;

pub use client::DataParallel;
pub use homes::ParameterDrop;
pub use open::{DataParallelOptions, LoadedReplicas, device_weights, state_sizes};
#[cfg(feature = "transfer")]
pub use pair::{LoadedPair, Pair, PairOptions, PairSide};
pub use sizes::{PoolSizes, StateSizes};
pub use state::{ParameterState, Parameters, ReplicaParameters};
