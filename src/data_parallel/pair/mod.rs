//! Two processes, each with a replica of one model, as a pair whose memory is used together under a burst.
//!
//! Each has [`Replicas`](crate::backend::Replicas) of two devices: its own, and that of the other process, whose calls are sent there
//! (`link.rs`, with the messages of [`crate::ranks`]). Each lends its own device to the other (`serve.rs`), with the weights that it
//! has itself. The one that listens leads (`leader.rs`): its [controller](super::controller) decides for both, and asks the other's
//! engine what it asks its own (`engine.rs`). The other one connects and follows (`follower.rs`).
//!
//! Nobody needs the other one. When the connection ends, each places its layers at home, computes its sequences again from their
//! tokens, and goes on alone. A process that connects later is taken in.

mod engine;
mod follower;
mod leader;
mod link;
mod message;
mod open;
mod serve;

pub use open::{LoadedPair, PairOptions, PairSide};

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::runtime::Runtime;

use self::follower::Follower;
use self::leader::Leader;
use super::controller::Control;
use super::state::Parameters;
use crate::error::{EngineError, Error};

/// The replica of the process that listens, and its device.
const LEADER: usize = 0;

/// The replica of the process that connects.
const FOLLOWER: usize = 1;

/// This process' part in a pair. It ends when this is dropped; the engine goes on alone then.
pub struct Pair(Part);

enum Part {
    Leader {
        leader: Arc<Leader>,
        control: Control,
        address: SocketAddr,
        /// Drives the connections.
        runtime: Option<Runtime>,
    },
    Follower(Arc<Follower>),
}

impl Pair {
    /// The state of this process' parameters, and the memory of its device.
    #[must_use]
    pub fn parameters(&self) -> Parameters {
        match &self.0 {
            Part::Leader { control, .. } => control.parameters(),
            Part::Follower(follower) => follower.parameters(),
        }
    }

    /// Whether the other process is there.
    #[must_use]
    pub fn is_paired(&self) -> bool {
        match &self.0 {
            Part::Leader {
                leader, control, ..
            } => leader.is_connected() && control.has(FOLLOWER),
            Part::Follower(follower) => follower.is_paired(),
        }
    }

    /// The address that the other process connects to, of the one that leads.
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        match &self.0 {
            Part::Leader { address, .. } => Some(*address),
            Part::Follower(_) => None,
        }
    }

    /// Has both drop duplicated parameters, whatever the demand. It waits until they have.
    ///
    /// # Errors
    /// The process that follows, one that is alone, or a change that has failed and will be taken back.
    pub fn drop_parameters(&self) -> Result<(), Arc<Error>> {
        self.control()?.drop_parameters()
    }

    /// Has each hold all parameters again, whatever the demand. It waits until they do.
    ///
    /// # Errors
    /// The process that follows, or a change that has failed and will be tried again.
    pub fn restore_parameters(&self) -> Result<(), Arc<Error>> {
        self.control()?.restore_parameters()
    }

    fn control(&self) -> Result<&Control, Arc<Error>> {
        match &self.0 {
            Part::Leader { control, .. } => Ok(control),
            Part::Follower(_) => {
                let reason = "the other process of the pair decides".to_owned();
                Err(Arc::new(EngineError::ParameterDrop { reason }.into()))
            }
        }
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        match &mut self.0 {
            Part::Leader {
                leader, runtime, ..
            } => {
                leader.close();
                if let Some(runtime) = runtime.take() {
                    // It may be dropped by a thread that must not wait.
                    runtime.shutdown_background();
                }
            }
            Part::Follower(follower) => follower.stop(),
        }
    }
}
