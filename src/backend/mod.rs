//! The trait between the model and a device, with its types.
//!
//! A backend owns memory (weights, activations, two pools) and runs steps. A [`Program`] is a list of operations ([`Op`])
//! over tensors planned in advance; a backend **compiles** it once into a [`Step`], and the step is **submitted** many times,
//! each time with another [`Batch`]: a CUDA graph, one wgpu submission and a promise in a browser all have that form.
//! Everything that differs between two submissions (token ids, lengths, slots, block tables) is in the batch, not in the
//! program.
//!
//! Operations have the granularity of the paper's blocks (Kimi Linear, arXiv 2510.26692), split where tests need to observe a
//! value. It is not a tensor library: no broadcasting, no autograd, no views.

mod batch;
mod block;
mod check;
mod choose;
mod collective;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub(crate) mod draw;
pub mod dry;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
mod gpu;
#[cfg(not(target_arch = "wasm32"))]
mod group;
mod handles;
mod home;
mod host;
mod memory_use;
#[cfg(not(target_arch = "wasm32"))]
mod offload;
mod operation;
mod parallelism;
#[cfg(not(target_arch = "wasm32"))]
mod parts;
mod place;
mod pool;
mod program;
mod random;
mod record;
#[cfg(not(target_arch = "wasm32"))]
mod relocate;
#[cfg(not(target_arch = "wasm32"))]
mod replica;
#[cfg(not(target_arch = "wasm32"))]
mod shared;
mod tensor;
mod ticket;
pub mod trace;
mod weight;
#[cfg(feature = "wgpu")]
pub mod wgpu;

pub use batch::{Batch, Capacity, FedToken, OutputRow, Segment, StateCheckpoint};
pub use block::{AddNorm, KdaBlock, MlaBlock, MlpBlock, MoeBlock};
pub use choose::{BackendKind, devices, open};
pub use collective::{CollectiveId, Collectives, Leave};
pub use draw::{Draw, DrawCapacity, Drawn, LogitChange};
#[cfg(not(target_arch = "wasm32"))]
pub use group::Group;
#[cfg(not(target_arch = "wasm32"))]
#[cfg(feature = "transfer")]
pub(crate) use group::divide::weight as divided_weight;
pub use home::{Caches, LayerHome};
pub use memory_use::MemoryUse;
#[cfg(not(target_arch = "wasm32"))]
pub use offload::Offload;
pub use operation::*;
pub use parallelism::Parallelism;
pub use place::{Cut, Place, Shard};
pub use pool::{Block, LatentLayout, LatentPool, Slot, StateLayout, StatePool};
pub use program::Program;
pub use random::{Random, RandomWeight};
pub use record::{LatentRecord, Orientation, StateRecord};
#[cfg(all(feature = "data-parallel", feature = "transfer"))]
pub(crate) use replica::Lent;
#[cfg(not(target_arch = "wasm32"))]
pub use replica::Replicas;
#[cfg(not(target_arch = "wasm32"))]
pub use shared::Traffic;
pub use tensor::{Element, Rows, Tensor, TensorValues};
#[cfg(not(target_arch = "wasm32"))]
pub use ticket::block_on;
#[cfg(target_arch = "wasm32")]
pub use ticket::pause;
pub use ticket::{MaybeSend, Ticket, await_device};
pub use weight::{Weight, WeightPart, WeightSource};

use crate::config::Dtype;
use crate::error::BackendError;

/// The memory in bytes that the program may use on the host: the machine's, or less if its control groups have a limit.
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
    /// Its index in that backend's list, the `N` of `--device N`.
    pub index: usize,
    /// The device's own name.
    pub name: String,
    /// Memory for weights, states and caches in bytes, if the device reports it; of a group, that of the device with the least.
    pub memory_bytes: Option<u64>,
    /// The dtype of its activations; accumulation, states, gates, softmax and router are f32 on all of them.
    pub precision: Dtype,
    /// The dtype of its latent cache.
    pub cache: Dtype,
}

/// Memory and steps of one device, of a [`Group`] of several, or of one and the host ([`Offload`]).
///
/// Handles ([`Weight`], [`Tensor`], [`StatePool`], [`LatentPool`]) belong to the backend that created them; their use with
/// another backend is refused if it can be detected.
pub trait Backend: MaybeSend {
    /// The device that this backend drives.
    fn device(&self) -> &Device;

    /// Whether a submission returns before the device has run it, so that the host can work meanwhile.
    fn is_asynchronous(&self) -> bool {
        false
    }

    /// Makes the backend usable again after a device was lost, if it can: a group whose nodes have connected again, or one of whose
    /// ranks failed in a step without being lost. Afterwards no
    /// step of before may be used, and the contents of states and latents are undefined.
    ///
    /// # Errors
    /// A device that is still lost.
    fn recover(&mut self) -> Result<()> {
        Ok(())
    }

    /// The number of devices that [split tensors](Backend::split_tensor) are divided among.
    fn ranks(&self) -> usize {
        1
    }

    /// The number of devices that it consists of.
    fn device_count(&self) -> usize {
        1
    }

    /// The bytes of the device's memory that nothing uses now, if the device reports them.
    fn free_memory(&mut self) -> Option<u64> {
        None
    }

    /// The bytes of what it has made and not yet freed, by use; of several devices their sum.
    fn memory(&self) -> MemoryUse {
        MemoryUse::default()
    }

    /// Loads a weight. Bytes that the device can read in place are not copied; others are streamed to it.
    ///
    /// # Errors
    /// A source whose parts do not add up to its shape, or too little memory.
    fn weight(&mut self, source: WeightSource) -> Result<Weight>;

    /// Whether a weight of this place is copied: nothing of its source is used after [`Backend::weight`] has returned, so that
    /// the source's memory can be given back.
    fn copies_weight(&self, _place: &Place) -> bool {
        false
    }

    /// Generates a weight of random numbers on the device, without a transfer from the host.
    ///
    /// # Errors
    /// Too little memory, an unsupported format, or a backend that generates no random numbers.
    fn random_weight(&mut self, _weight: RandomWeight) -> Result<Weight> {
        Err(unmade("weights"))
    }

    /// Frees a weight: its handle is refused from now on. Steps that were compiled with it keep its memory until they are dropped.
    ///
    /// # Errors
    /// A weight that this backend did not make or has freed already, or a backend that frees none.
    fn release(&mut self, _weight: Weight) -> Result<()> {
        Err(fixed("a weight that is freed"))
    }

    /// Fills every slot of a pool with random numbers on the device: the states of a layer in their order in the pool (slots,
    /// heads, K, V), and its convolution states (slots, channels, taps).
    ///
    /// # Errors
    /// A device that was lost, or a backend that generates no random numbers.
    fn fill_states(&mut self, _pool: &StatePool, _random: Random) -> Result<()> {
        Err(unmade("states"))
    }

    /// Fills every block of a pool with random numbers on the device: the rows of a layer in their order in the pool.
    ///
    /// # Errors
    /// A device that was lost, or a backend that generates no random numbers.
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

    /// Plans an activation of which every rank of a group has an equal part of the columns; on one device it is like any other.
    ///
    /// # Errors
    /// Too little memory.
    fn split_tensor(
        &mut self,
        rows: Rows,
        capacity: usize,
        width: usize,
        element: Element,
    ) -> Result<Tensor> {
        self.tensor(rows, capacity, width, element)
    }

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

    /// Creates the pool of KDA states. The contents of a slot are undefined until a step or [`Backend::write_state`] writes
    /// it.
    ///
    /// # Errors
    /// A layout that the device cannot hold.
    fn state_pool(&mut self, layout: StateLayout) -> Result<StatePool>;

    /// Creates the pool of MLA latents.
    ///
    /// # Errors
    /// A layout that the device cannot hold, or a dtype that it does not cache in.
    fn latent_pool(&mut self, layout: LatentLayout) -> Result<LatentPool>;

    /// Changes the number of slots of a pool; returns its handle from now on, with the same number. The contents of slots that are
    /// in both are kept, those of new ones are undefined. Steps that were compiled with the pool before are refused afterwards; they
    /// keep the memory of before until they are dropped, which is not counted. The new memory of one layer is there beside the old
    /// one.
    ///
    /// # Errors
    /// Too little memory, a pool that this backend did not make, or a backend whose pools keep their size. The pool then has its
    /// size of before, with the contents of all slots that are in both sizes.
    fn resize_states(&mut self, _pool: &StatePool, _slots: usize) -> Result<StatePool> {
        Err(fixed("pools of states that change their size"))
    }

    /// Changes the number of blocks of a pool, as [`Backend::resize_states`] changes that of slots.
    ///
    /// # Errors
    /// Those of [`Backend::resize_states`].
    fn resize_latents(&mut self, _pool: &LatentPool, _blocks: usize) -> Result<LatentPool> {
        Err(fixed("pools of latents that change their size"))
    }

    /// Frees a pool of states: its handle, and steps that were compiled with it, are refused from now on.
    ///
    /// # Errors
    /// A pool that this backend did not make or has freed already, or a backend that frees none.
    fn release_states(&mut self, _pool: StatePool) -> Result<()> {
        Err(fixed("a pool of states that is freed"))
    }

    /// Frees a pool of latents, as [`Backend::release_states`] frees one of states.
    ///
    /// # Errors
    /// Those of [`Backend::release_states`].
    fn release_latents(&mut self, _pool: LatentPool) -> Result<()> {
        Err(fixed("a pool of latents that is freed"))
    }

    /// Computes a layer of the model elsewhere from now on. Steps that were compiled before are refused afterwards.
    ///
    /// # Errors
    /// A backend whose layers have a fixed place (all but a replica), devices that are not there, or too little memory on them. The
    /// layer then is where it was.
    fn place(&mut self, _layer: usize, _home: &LayerHome, _caches: Caches) -> Result<()> {
        Err(fixed("layers that change their place"))
    }

    /// Reads one KDA layer of one slot.
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

    /// Reads the first `tokens` latent rows of one block and layer.
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

    /// Compiles a program to a step for batches of at most `capacity`. The shapes of all operations are checked first, with
    /// the same messages for every backend; nothing is executed before [`Step::submit`].
    ///
    /// # Errors
    /// [`BackendError::Shape`] for shapes that do not fit, [`BackendError::Unsupported`] for an operation that the backend
    /// does not support, or too little memory for the step's own buffers.
    fn compile(&mut self, program: &Program, capacity: Capacity) -> Result<Box<dyn Step>>;

    /// Whether the device can exchange results with others without the host.
    ///
    /// # Errors
    /// A device in another process that is gone.
    fn collectives(&mut self) -> Result<Collectives> {
        Ok(Collectives::Never)
    }

    /// A new id, under which devices join.
    ///
    /// # Errors
    /// A device that exchanges nothing by itself.
    fn collective_id(&mut self) -> Result<CollectiveId> {
        Err(alone())
    }

    /// Joins `ranks` devices as number `rank`; returns when all of them have joined under this id, so each is called on a thread of
    /// its own. In programs that are compiled afterwards [`Op::AllReduce`] and [`Op::AllGather`] are exchanges between these
    /// devices, and [`Op::ExpertRows`] leaves zeros for experts of others. Their steps wait for each other: all must be submitted,
    /// each on a thread of its own. The result ends the device's part.
    ///
    /// # Errors
    /// A device that exchanges nothing by itself, or cannot reach the others.
    fn join(&mut self, _id: CollectiveId, _rank: usize, _ranks: usize) -> Result<Leave> {
        Err(alone())
    }

    /// Reports how many of the calls that came before a submission the device has confirmed, and their number, while the
    /// submission waits for them. Only a browser confirms calls later, among them the compilation of shaders, which takes long.
    fn report_confirmed(&mut self, _report: ConfirmedReport) {}
}

/// Receives the number of confirmed calls and the number of all.
pub type ConfirmedReport = Box<dyn Fn(usize, usize) + Send>;

/// A compiled program, executed by each submission. A row's arithmetic never depends on the other rows of the batch.
pub trait Step: MaybeSend {
    /// The names of the executed operations, in order; a block that the backend implements as a whole is one of them.
    fn operations(&self) -> &[&'static str];

    /// Turns timing on or off for the following submissions; times are in [`StepOutput::milliseconds`]. It is off at first,
    /// because timing waits for each operation separately, which is slower.
    ///
    /// # Errors
    /// A backend that cannot time operations.
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

fn fixed(what: &str) -> BackendError {
    BackendError::Unsupported {
        backend: "device's",
        what: what.to_owned(),
    }
}

fn alone() -> BackendError {
    BackendError::Unsupported {
        backend: "device's",
        what: "exchanges with other devices".to_owned(),
    }
}

/// The result for one output row.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Choice {
    /// The best candidates with their logits, best first; of equal logits the lower id comes first.
    pub candidates: Vec<(u32, f32)>,
    /// `ln sum exp(logit)` over the whole row.
    pub log_normaliser: f32,
    /// The logit of the row's [`OutputRow::target`].
    pub target_logit: Option<f32>,
    /// Whether every logit is finite. If not, the other fields are meaningless.
    pub finite: bool,
}

/// The result of a submission.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct StepOutput {
    /// One choice per output row, in the batch's order.
    pub choices: Vec<Choice>,
    /// One result per draw, in the batch's order: a token and its logit, or `None` if the draw allows no token. Of a row that is
    /// not finite it is any token.
    pub draws: Vec<Option<Drawn>>,
    /// The logits of the output rows, `[outputs, vocabulary]`, if [`Select::keep_rows`] is set.
    pub logits: Vec<f32>,
    /// The probed tensors, in the program's order.
    pub probes: Vec<TensorValues>,
    /// Time per kind of operation, in the order of their first appearance, if [`Step::time`] is on; not sent to another process.
    #[serde(skip)]
    pub milliseconds: Vec<(&'static str, f64)>,
}

impl StepOutput {
    /// Adds the time of one operation to the sum of its kind.
    pub(crate) fn add_time(&mut self, name: &'static str, milliseconds: f64) {
        let mut kinds = self.milliseconds.iter_mut();
        match kinds.find(|(found, _)| *found == name) {
            Some((_, sum)) => *sum += milliseconds,
            None => self.milliseconds.push((name, milliseconds)),
        }
    }
}
