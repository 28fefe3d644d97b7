//! What the processes of a model say to each other: calls of a backend, and their results.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::backend::{
    Batch, Block, Capacity, CollectiveId, Collectives, Device, Element, LatentLayout, LatentPool,
    LatentRecord, MemoryUse, Parallelism, Place, Program, Random, RandomWeight, Rows, Slot,
    StateLayout, StatePool, StateRecord, StepOutput, Tensor, TensorValues, Weight,
};
use crate::config::Dtype;
use crate::error::{BackendError, Scope};

/// The device of a rank, as its node describes it when it connects.
#[derive(Serialize, Deserialize)]
pub(crate) struct RankDevice {
    pub(super) backend: String,
    pub(super) index: usize,
    pub(super) name: String,
    pub(super) memory_bytes: Option<u64>,
    pub(super) precision: Dtype,
    pub(super) cache: Dtype,
}

impl From<&Device> for RankDevice {
    fn from(device: &Device) -> Self {
        Self {
            backend: device.backend.to_owned(),
            index: device.index,
            name: device.name.clone(),
            memory_bytes: device.memory_bytes,
            precision: device.precision,
            cache: device.cache,
        }
    }
}

impl RankDevice {
    /// The device of a rank on node `node`. Devices of several nodes have different numbers.
    pub(super) fn device(self, node: usize) -> Device {
        // The last is the tests' machine in a GPU's place.
        let known = ["cpu", "wgpu", "cuda", "dry", "cuda-emulated"];
        let backend = known.into_iter().find(|name| *name == self.backend);
        Device {
            backend: backend.unwrap_or("remote"),
            index: node << 16 | self.index,
            name: format!("{} on node {node}", self.name),
            memory_bytes: self.memory_bytes,
            precision: self.precision,
            cache: self.cache,
        }
    }
}

/// A call of one of a node's ranks.
#[derive(Serialize, Deserialize)]
pub(super) struct Call {
    /// The rank, counted among the node's.
    pub(super) rank: usize,
    pub(super) request: Request,
}

/// What is asked of a rank: a method of [`Backend`](crate::backend::Backend) or of one of its steps.
#[derive(Serialize, Deserialize)]
pub(crate) enum Request {
    /// The devices of all ranks of the node; the first call.
    Devices,
    /// This rank's part of the weight that these tensors make up.
    Weight {
        tensors: Vec<String>,
        stack: usize,
        place: Place,
        degrees: Parallelism,
        /// The rank, counted within its stage.
        rank: usize,
    },
    /// A use of the weight, or of a part of its experts, that this process has of the same model and these tensors.
    Use {
        name: String,
        tensors: Vec<String>,
        place: Place,
        /// Its shape: matrices, rows and columns.
        shape: [usize; 3],
    },
    RandomWeight(RandomWeight),
    Tensor(Rows, usize, usize, Element),
    WriteTensor(Tensor, TensorValues),
    ReadTensor(Tensor, usize),
    StatePool(StateLayout),
    LatentPool(LatentLayout),
    /// Frees a weight.
    Release(Weight),
    ResizeStates(StatePool, usize),
    ResizeLatents(LatentPool, usize),
    ReleaseStates(StatePool),
    ReleaseLatents(LatentPool),
    /// The bytes of what the rank has made.
    Memory,
    FillStates(StatePool, Random),
    FillLatents(LatentPool, Random),
    ReadState(StatePool, usize, Slot),
    WriteState(StatePool, usize, Slot, StateRecord),
    ReadLatents(LatentPool, usize, Block, usize),
    WriteLatents(LatentPool, usize, Block, LatentRecord),
    /// Compiles a step, which has this number from then on.
    Compile(u64, Program, Capacity),
    Time(u64, bool),
    Submit(u64, Batch),
    /// Drops a step.
    Drop(u64),
    /// Fails if the rank's device is lost.
    Recover,
    Collectives,
    CollectiveId,
    Join(CollectiveId, usize, usize),
    /// Ends the rank's part in exchanges with others; not queued behind its other calls, which may wait for them.
    Leave,
}

/// The result of a request.
#[derive(Serialize, Deserialize)]
pub(crate) enum Reply {
    Done,
    Devices(Vec<RankDevice>),
    Weight(Weight),
    Tensor(Tensor),
    Values(TensorValues),
    StatePool(StatePool),
    LatentPool(LatentPool),
    Memory(MemoryUse),
    State(StateRecord),
    Latents(LatentRecord),
    /// The names of a step's operations.
    Operations(Vec<String>),
    Output(StepOutput),
    Collectives(Collectives),
    CollectiveId(CollectiveId),
    Failed(Failure),
}

/// An error of a rank.
#[derive(Serialize, Deserialize)]
pub(crate) struct Failure {
    /// Whether the device is lost.
    pub(crate) lost: bool,
    pub(crate) what: String,
}

impl From<&BackendError> for Failure {
    fn from(error: &BackendError) -> Self {
        Self {
            lost: error.scope() == Scope::Device,
            what: error.to_string(),
        }
    }
}

/// The bytes of a message.
pub(crate) fn encode(message: &impl Serialize) -> Result<Vec<u8>, BackendError> {
    postcard::to_stdvec(message).map_err(|error| invalid("sending", &error))
}

/// The message of these bytes.
pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, BackendError> {
    match postcard::take_from_bytes(bytes) {
        Ok((message, [])) => Ok(message),
        Ok((_, rest)) => Err(invalid(
            "reading",
            &format!("{} bytes too many", rest.len()),
        )),
        Err(error) => Err(invalid("reading", &error)),
    }
}

fn invalid(doing: &str, reason: &dyn std::fmt::Display) -> BackendError {
    BackendError::Driver {
        backend: "remote",
        what: format!("{doing} a message"),
        reason: reason.to_string(),
    }
}
