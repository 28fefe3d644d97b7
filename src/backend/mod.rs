//! The trait between the model and a device, and the types that cross it.
//!
//! A backend owns memory (weights, activations, two pools) and runs steps. A [`Program`] is a list of operations ([`Op`])
//! over tensors planned beforehand; a backend **compiles** it once into a [`Step`], and the step is **submitted** many
//! times, each time with another [`Batch`]: a CUDA graph, one wgpu submission and a browser's promise all have that form.
//! Nothing that differs between two submissions (token ids, lengths, slots, block tables) is in a program; it travels in
//! the batch.
//!
//! The grain is that of the paper's blocks (Kimi Linear, arXiv 2510.26692), cut where a fixture can enter. It is not a
//! tensor library: no broadcasting, no autograd, no views.

mod batch;
mod block;
mod check;
#[cfg(not(target_arch = "wasm32"))]
mod choose;
mod collective;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod dry;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
mod gpu;
mod handles;
mod host;
mod operation;
mod pool;
mod program;
mod random;
mod record;
mod tensor;
mod ticket;
pub mod trace;
mod weight;
#[cfg(feature = "wgpu")]
pub mod wgpu;

pub use batch::{Batch, Capacity, OutputRow, Segment, StateCheckpoint};
pub use block::{KdaBlock, MlaBlock, MlpBlock, MoeBlock};
#[cfg(not(target_arch = "wasm32"))]
pub use choose::{BackendKind, devices, open};
pub use collective::{Alone, Collective, Shard, Threads};
pub use operation::*;
pub use pool::{Block, LatentLayout, LatentPool, Slot, StateLayout, StatePool};
pub use program::Program;
pub use random::{Random, RandomWeight};
pub use record::{LatentRecord, Orientation, StateRecord};
pub use tensor::{Element, Rows, Tensor, TensorValues};
#[cfg(not(target_arch = "wasm32"))]
pub use ticket::block_on;
pub use ticket::{MaybeSend, Ticket, await_device};
pub use weight::{Weight, WeightPart, WeightSource};

use crate::config::Dtype;
use crate::error::BackendError;

/// The memory that the program may have on the host, in bytes: the machine's, or what control groups leave it of that.
#[must_use]
pub fn host_memory() -> Option<u64> {
    host::memory()
}

/// The result of compiling or submitting.
pub type Result<T> = std::result::Result<T, BackendError>;

/// Human-readable description of a device.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Device {
    /// The backend that drives it: `cpu`, `wgpu` or `cuda`.
    pub backend: &'static str,
    /// Its place in that backend's list, the `N` of `--device N`.
    pub index: usize,
    /// The device's own name.
    pub name: String,
    /// Memory that weights, states and caches share, in bytes, where the device tells it.
    pub memory_bytes: Option<u64>,
    /// The dtype of its activations; accumulation, states, gates, softmax and router are f32 on all of them.
    pub precision: Dtype,
    /// The dtype of its latent cache.
    pub cache: Dtype,
}

/// Memory and steps of one device (or of one rank of several).
///
/// Handles ([`Weight`], [`Tensor`], [`StatePool`], [`LatentPool`]) belong to the backend that made them; using them
/// with another is refused where it can be seen.
pub trait Backend: MaybeSend {
    /// The device that this backend drives.
    fn device(&self) -> &Device;

    /// Which part of heads, experts and vocabulary this backend holds; [`Shard::WHOLE`] on one device.
    fn shard(&self) -> Shard;

    /// Takes a weight. The bytes stay where they are if the device can read them there, else they are streamed in.
    ///
    /// # Errors
    /// A source whose parts do not add up to its shape, or too little memory.
    fn weight(&mut self, source: WeightSource) -> Result<Weight>;

    /// Makes a weight of random numbers where weights are kept: nothing of it passes through the host.
    ///
    /// # Errors
    /// Too little memory, a format that it does not make, or a backend that makes none.
    fn random_weight(&mut self, _weight: RandomWeight) -> Result<Weight> {
        Err(unmade("weights"))
    }

    /// Fills every slot of a pool with random numbers likewise: the states of a layer in their order in the pool (slots,
    /// heads, K, V), and its convolution states (slots, channels, taps).
    ///
    /// # Errors
    /// A device that was lost, or a backend that makes none.
    fn fill_states(&mut self, _pool: &StatePool, _random: Random) -> Result<()> {
        Err(unmade("states"))
    }

    /// Fills every block of a pool with random numbers likewise: the rows of a layer in their order in the pool.
    ///
    /// # Errors
    /// A device that was lost, or a backend that makes none.
    fn fill_latents(&mut self, _pool: &LatentPool, _random: Random) -> Result<()> {
        Err(unmade("latents"))
    }

    /// Plans an activation of at most `capacity` rows of `width` elements. Its contents are undefined until written.
    ///
    /// # Errors
    /// Too little memory.
    fn tensor(
        &mut self,
        rows: Rows,
        capacity: usize,
        width: usize,
        element: Element,
    ) -> Result<Tensor>;

    /// Overwrites a tensor's first rows, `values.len() / width` of them.
    ///
    /// # Errors
    /// Values of another element type, or more of them than the tensor holds.
    fn write_tensor(&mut self, tensor: Tensor, values: &TensorValues) -> Result<()>;

    /// Reads a tensor's first `rows` rows.
    ///
    /// # Errors
    /// More rows than the tensor holds, or a device that was lost.
    fn read_tensor(&mut self, tensor: Tensor, rows: usize) -> Ticket<TensorValues>;

    /// Makes the pool of KDA states. Slots hold nothing defined until a step or [`Backend::write_state`] writes them.
    ///
    /// # Errors
    /// A layout that the device cannot hold.
    fn state_pool(&mut self, layout: StateLayout) -> Result<StatePool>;

    /// Makes the pool of MLA latents.
    ///
    /// # Errors
    /// A layout that the device cannot hold, or a dtype that it does not cache in.
    fn latent_pool(&mut self, layout: LatentLayout) -> Result<LatentPool>;

    /// Copies one KDA layer of one slot out.
    fn read_state(&mut self, pool: &StatePool, layer: usize, slot: Slot) -> Ticket<StateRecord>;

    /// Overwrites one KDA layer of one slot.
    ///
    /// # Errors
    /// A record of another shape, with both shapes in the message.
    fn write_state(
        &mut self,
        pool: &StatePool,
        layer: usize,
        slot: Slot,
        record: &StateRecord,
    ) -> Result<()>;

    /// Copies the first `tokens` latent rows of one block and layer out.
    fn read_latents(
        &mut self,
        pool: &LatentPool,
        layer: usize,
        block: Block,
        tokens: usize,
    ) -> Ticket<LatentRecord>;

    /// Overwrites the first rows of one block and layer.
    ///
    /// # Errors
    /// A record of another width, or longer than a block.
    fn write_latents(
        &mut self,
        pool: &LatentPool,
        layer: usize,
        block: Block,
        record: &LatentRecord,
    ) -> Result<()>;

    /// Makes a step of a program, for batches of at most `capacity`. The shapes of all operations are checked first, in
    /// the same words for every backend; nothing runs before [`Step::submit`].
    ///
    /// # Errors
    /// [`BackendError::Shape`] where shapes do not fit, [`BackendError::Unsupported`] for an operation that the backend does
    /// not do, or too little memory for the step's own buffers.
    fn compile(&mut self, program: &Program, capacity: Capacity) -> Result<Box<dyn Step>>;
}

/// A compiled program, run each time it is submitted. A row's arithmetic never depends on which other rows are in the
/// batch.
pub trait Step: MaybeSend {
    /// The names of what is run, in order; a block that the backend took whole is one of them.
    fn operations(&self) -> &[&'static str];

    /// Whether submissions from now on return what their operations took, in [`StepOutput::milliseconds`]. At first they do
    /// not: each operation is then waited for by itself, which takes longer.
    ///
    /// # Errors
    /// A backend that cannot tell.
    fn time(&mut self, on: bool) -> Result<()>;

    /// Runs the step over `batch`. Steps submitted to one backend run in the order of their submission.
    ///
    /// # Errors
    /// A batch that does not fit the capacity, names a slot or block that does not exist, writes one slot twice, or
    /// holds a token id outside the vocabulary.
    fn submit(&mut self, batch: &Batch) -> Result<Ticket<StepOutput>>;
}

fn unmade(what: &str) -> BackendError {
    BackendError::Unsupported {
        backend: "device's",
        what: format!("{what} of random numbers"),
    }
}

/// What the tokens of one output row came to.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// The best candidates with their logits, best first; of equal logits the lower id comes first.
    pub candidates: Vec<(u32, f32)>,
    /// `ln sum exp(logit)` over the whole row.
    pub log_normaliser: f32,
    /// The logit of the row's [`OutputRow::target`].
    pub target_logit: Option<f32>,
    /// Whether every logit was finite. Where false, the other fields mean nothing.
    pub finite: bool,
}

/// What a submission gives back.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepOutput {
    /// One choice an output row, in the batch's order.
    pub choices: Vec<Choice>,
    /// The logits of the output rows, `[outputs, vocabulary]`, where [`Select::keep_rows`] asked for them.
    pub logits: Vec<f32>,
    /// The probed tensors, in the order of step_options.
    pub probes: Vec<TensorValues>,
    /// What each kind of operation took, in the order of their first appearance, where [`Step::time`] asked for it.
    pub milliseconds: Vec<(&'static str, f64)>,
}

impl StepOutput {
    /// Adds what one operation took to the sum of its kind.
    pub(crate) fn add_time(&mut self, name: &'static str, milliseconds: f64) {
        let mut kinds = self.milliseconds.iter_mut();
        match kinds.find(|(found, _)| *found == name) {
            Some((_, sum)) => *sum += milliseconds,
            None => self.milliseconds.push((name, milliseconds)),
        }
    }
}
