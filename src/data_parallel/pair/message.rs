//! What the two processes of a pair say to each other.

use serde::{Deserialize, Serialize};

use crate::backend::{Caches, LayerHome};
use crate::data_parallel::sizes::PoolSizes;
use crate::data_parallel::state::ParameterState;
use crate::engine::Status;
use crate::ranks::Request;

/// A call.
#[derive(Serialize, Deserialize)]
pub(super) enum Call {
    /// Of the device that the other process lends.
    Device(Request),
    /// Of its engine; only the process that leads makes such calls.
    Engine(Order),
}

/// What an engine is asked between two of its steps.
#[derive(Serialize, Deserialize)]
pub(super) enum Order {
    Status,
    Place {
        layer: usize,
        home: LayerHome,
        caches: Caches,
    },
    Resize(PoolSizes),
    RecomputeAll,
    Resume,
    /// The state of its parameters from now on, and the sizes of its pools.
    Note(ParameterState, PoolSizes),
}

/// The answer to an order.
#[derive(Serialize, Deserialize)]
pub(super) enum Answer {
    Done,
    /// `None` of an engine that has stopped.
    Status(Option<Status>),
    Failed(String),
}
