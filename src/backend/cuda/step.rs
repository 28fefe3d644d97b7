//! A step of the CUDA backend: launches are encoded without their grid sizes, which follow from each submission's batch.
//!
//! Operations are encoded in `operations`, `products`, `kda`, `attention`, `experts`, `collectives`, `trace` and `answers`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Shared;
use super::machine::{Buffer, Command, Launch, NO_STEP, Place, Product, Work, blocks, fitting};
use super::memory;
use super::params::{Arguments, Params};
use crate::backend::check::Demands;
use crate::backend::gpu::answers::{Answer, Asked, Submission};
use crate::backend::gpu::batch_metadata::{BatchMetadata, MOST_SPLITS, MetadataLayout};
use crate::backend::handles::Uses;
use crate::backend::{Batch, Capacity, Result, Rows, Step, StepOutput, Tensor, Ticket, Weight};

/// Minimum number of positions that one block of a decode attends to; more are divided among several blocks.
const SPAN: usize = 256;
/// Maximum number of blocks for a row's positions: an H200's multiprocessors, as in `kernels/mla_decode.cu`.
const MOST_SPANS: usize = 132;
/// Positions that a prefill expands together, a multiple of the run of `kernels/mla_prefill.cu`.
pub(super) const WINDOW: usize = 4096;

/// Rows and columns per tile, and bytes of its stages in shared memory: as in `kernels/shared/tile.h`.
pub(super) const TILE: usize = 128;
pub(super) const STAGES_BYTES: usize = 4 * 2 * 2 * 128 * 40;

/// A value that depends on the batch.
type OfBatch<T> = Box<dyn Fn(&BatchMetadata) -> T + Send>;
/// Commands whose number depends on the batch.
type Listed = OfBatch<Result<Vec<Command>>>;

/// Number of blocks of a launch for a batch; the launch is skipped if any dimension is 0.
enum Size {
    Grid(OfBatch<[u32; 3]>),
    /// The blocks for this number of elements, and the elements per block.
    Elements(OfBatch<usize>, u64),
}

impl Size {
    fn grid(&self, metadata: &BatchMetadata) -> Result<[u32; 3]> {
        Ok(match self {
            Self::Grid(grid) => grid(metadata),
            Self::Elements(elements, each) => [blocks(elements(metadata) as u64, *each)?, 1, 1],
        })
    }
}

/// A kernel, its block size and its parameters.
pub(super) struct Kernel {
    pub(super) entry: &'static str,
    pub(super) threads: u32,
    /// Bytes of dynamic shared memory.
    pub(super) shared: u32,
    arguments: Arguments,
}

impl Kernel {
    pub(super) fn new<P: Params>(entry: &'static str, threads: u32, params: &P) -> Self {
        Self {
            entry,
            threads,
            shared: 0,
            arguments: Arguments::new(params),
        }
    }

    /// Its launch over this grid.
    pub(super) fn over(self, grid: [u32; 3]) -> Launch {
        Launch {
            kernel: self.entry,
            grid,
            threads: self.threads,
            shared: self.shared,
            arguments: self.arguments,
        }
    }

    /// The same with this number of bytes of dynamic shared memory.
    ///
    /// # Errors
    /// A number that exceeds 32 bits.
    pub(super) fn shared(self, bytes: usize) -> Result<Self> {
        let shared = fitting("shared memory", bytes.next_multiple_of(16) as u64)?;
        Ok(Self { shared, ..self })
    }
}

enum Encoded {
    Launch(Launch, Size),
    /// Of all tokens, if any segment has several.
    Product(Product),
    /// With the number of bytes.
    Copy(Arc<Buffer>, Arc<Buffer>, OfBatch<u64>),
    Answer(Arc<Buffer>, Answer),
    /// Commands whose number depends on the batch.
    Each(Listed),
}

/// The index of the word of the batch's header that counts rows of this kind.
pub(super) fn kind(rows: Rows) -> u32 {
    crate::backend::gpu::batch_metadata::count_word(rows)
}

pub(super) struct CudaStep {
    pub(super) shared: Arc<Shared>,
    pub(super) capacity: Capacity,
    pub(super) metadata_layout: MetadataLayout,
    id: u64,
    /// The batch's metadata on the device.
    pub(super) batch: Arc<Buffer>,
    /// Buffers that encoded commands point to, kept for as long as they may run.
    kept: Vec<Arc<Buffer>>,
    demands: Demands,
    uses: Uses,
    /// Maximum number of splits of a segment of a recurrence.
    pub(super) splits: usize,
    /// A word that is 0 between launches, if any launch counts its blocks.
    counter: Option<Arc<Buffer>>,
    names: Vec<&'static str>,
    /// Each with the index of its operation's name.
    commands: Vec<(usize, Encoded)>,
    timed: bool,
}

impl CudaStep {
    pub(super) fn new(
        shared: Arc<Shared>,
        capacity: Capacity,
        demands: Demands,
        uses: Uses,
    ) -> Result<Self> {
        static STEPS: AtomicU64 = AtomicU64::new(NO_STEP + 1);
        let block_tokens = shared.memory().block_tokens();
        let metadata_layout = MetadataLayout {
            window: WINDOW,
            span: SPAN,
            most_spans: MOST_SPANS,
            block_tokens,
        };
        let bytes = 4 * metadata_layout.words(&capacity, &demands.draws()) as u64;
        let batch = Arc::new(Buffer::new(&shared.machine, "a step's batch", bytes)?);
        Ok(Self {
            shared,
            capacity,
            metadata_layout,
            id: STEPS.fetch_add(1, Ordering::Relaxed),
            batch,
            kept: Vec::new(),
            demands,
            uses,
            splits: MOST_SPLITS,
            counter: None,
            names: Vec::new(),
            commands: Vec::new(),
            timed: false,
        })
    }

    pub(super) fn name(&mut self, name: &'static str) {
        self.names.push(name);
    }

    /// Encodes a launch whose blocks process `each` of the elements of all rows of this kind, `width` per row.
    pub(super) fn launch_each(&mut self, kernel: Kernel, rows: Rows, width: usize, each: u64) {
        self.launch_elements(kernel, each, move |metadata| metadata.count(rows) * width);
    }

    /// Encodes a launch whose blocks process `each` of this number of elements; it is skipped if there are none.
    pub(super) fn launch_elements(
        &mut self,
        kernel: Kernel,
        each: u64,
        elements: impl Fn(&BatchMetadata) -> usize + Send + 'static,
    ) {
        let size = Size::Elements(Box::new(elements), each);
        self.push_command(Encoded::Launch(kernel.over([0; 3]), size));
    }

    fn push_command(&mut self, command: Encoded) {
        self.commands
            .push((self.names.len().saturating_sub(1), command));
    }

    /// Encodes one launch.
    pub(super) fn launch(
        &mut self,
        kernel: Kernel,
        size: impl Fn(&BatchMetadata) -> [u32; 3] + Send + 'static,
    ) {
        let size = Size::Grid(Box::new(size));
        self.push_command(Encoded::Launch(kernel.over([0; 3]), size));
    }

    /// Encodes a product of all tokens by cuBLASLt, for batches with rows of longer segments. Its results in rows of single
    /// tokens must be overwritten later.
    pub(super) fn library(&mut self, product: Product) {
        self.push_command(Encoded::Product(product));
    }

    /// Returns these rows in every submission, with their values at its end, after which nothing overwrites them.
    pub(super) fn answer(&mut self, buffer: Arc<Buffer>, answer: Answer) {
        self.push_command(Encoded::Answer(buffer, answer));
    }

    /// Encodes a copy of the first bytes of a buffer.
    pub(super) fn copy(
        &mut self,
        from: &Arc<Buffer>,
        to: &Arc<Buffer>,
        bytes: impl Fn(&BatchMetadata) -> u64 + Send + 'static,
    ) {
        let (from, to) = (Arc::clone(from), Arc::clone(to));
        self.push_command(Encoded::Copy(from, to, Box::new(bytes)));
    }

    pub(super) fn tensor(&self, tensor: Tensor) -> Result<Arc<Buffer>> {
        self.shared.memory().tensor(tensor).cloned()
    }

    /// A weight as it is stored: its buffer and the id of its format.
    pub(super) fn stored(&self, weight: Weight) -> Result<(Arc<Buffer>, u32)> {
        self.shared.memory().weight(weight)?.stored()
    }

    /// A weight's buffer, if it is stored in bf16.
    pub(super) fn bf16(&self, weight: Weight) -> Result<Option<Arc<Buffer>>> {
        Ok(self.shared.memory().weight(weight)?.bf16().cloned())
    }

    /// A weight in bf16.
    pub(super) fn matrix(&self, weight: Weight) -> Result<Arc<Buffer>> {
        let mut memory = self.shared.memory();
        memory.weight(weight)?.matrix(&self.shared.machine)
    }

    /// Encodes commands whose number depends on the batch.
    pub(super) fn each(
        &mut self,
        list: impl Fn(&BatchMetadata) -> Result<Vec<Command>> + Send + 'static,
    ) {
        self.push_command(Encoded::Each(Box::new(list)));
    }

    /// Scratch memory between two kernels of one operation.
    pub(super) fn scratch(&mut self, name: &'static str, bytes: usize) -> Result<Arc<Buffer>> {
        let make = memory::make(&self.shared.machine);
        let buffer = self.shared.memory().scratch(&make, name, bytes as u64)?;
        self.kept.push(Arc::clone(&buffer));
        Ok(buffer)
    }

    /// A word that is 0 before each launch, in which its blocks count themselves. Launches of a step do not overlap.
    pub(super) fn counter(&mut self) -> Result<Arc<Buffer>> {
        if let Some(counter) = &self.counter {
            return Ok(Arc::clone(counter));
        }
        let counter = Arc::new(Buffer::new(&self.shared.machine, "a step's counter", 4)?);
        self.shared.machine.write(&counter, 0, &[0; 4])?;
        self.counter = Some(Arc::clone(&counter));
        Ok(counter)
    }

    /// The commands of one batch, and the operation of each.
    fn commands(&self, metadata: &BatchMetadata) -> Result<(Vec<Command>, Vec<usize>)> {
        let mut commands = Vec::with_capacity(self.commands.len());
        let mut operations = Vec::with_capacity(self.commands.len());
        for (operation, encoded) in &self.commands {
            let command = match encoded {
                Encoded::Launch(launch, size) => {
                    let grid = size.grid(metadata)?;
                    let launch = Launch {
                        grid,
                        ..launch.clone()
                    };
                    (!grid.contains(&0)).then_some(Command::Launch(launch))
                }
                Encoded::Product(product) => {
                    // Single rows among others are multiplied as well, and then overwritten by the kernel for them.
                    let product = Product {
                        rows: metadata.tokens,
                        ..product.clone()
                    };
                    (metadata.several_rows > 0).then_some(Command::Product(product))
                }
                Encoded::Copy(from, to, bytes) => {
                    let bytes = bytes(metadata);
                    let (from, to) = (Place::new(from, 0, bytes)?, Place::new(to, 0, bytes)?);
                    (bytes > 0).then_some(Command::Copy { from, to })
                }
                Encoded::Answer(..) => None,
                Encoded::Each(list) => {
                    let list = list(metadata)?;
                    operations.extend(std::iter::repeat_n(*operation, list.len()));
                    commands.extend(list);
                    None
                }
            };
            if let Some(command) = command {
                commands.push(command);
                operations.push(*operation);
            }
        }
        Ok((commands, operations))
    }
}

impl Drop for CudaStep {
    fn drop(&mut self) {
        self.shared.machine.forget(self.id);
        self.uses = Uses::default();
        self.shared.memory().sweep();
    }
}

impl Step for CudaStep {
    fn time(&mut self, on: bool) -> Result<()> {
        self.timed = on;
        Ok(())
    }

    fn operations(&self) -> &[&'static str] {
        &self.names
    }

    fn submit(&mut self, batch: &Batch) -> Result<Ticket<StepOutput>> {
        let asked = Asked {
            capacity: &self.capacity,
            demands: &self.demands,
            layout: &self.metadata_layout,
            splits: self.splits,
            metadata_bytes: self.batch.bytes,
        };
        let answers = self
            .commands
            .iter()
            .filter_map(|(_, encoded)| match encoded {
                Encoded::Answer(buffer, answer) => Some((buffer, *answer)),
                _ => None,
            });
        let size = |tensor: Tensor| memory::size(tensor.element) as usize;
        let kinds = answers.clone().map(|(_, answer)| answer);
        let submission = Submission::new(batch, &asked, kinds, size)?;
        let places = answers.zip(submission.lengths());
        let places = places
            .map(|((buffer, _), bytes)| Place::new(buffer, 0, bytes as u64))
            .collect::<Result<Vec<_>>>()?;
        let metadata = &submission.metadata;
        self.shared.memory().check_uses(&self.uses)?;
        let (commands, operations) = self.commands(metadata)?;
        let ticket = self.shared.machine.submit(&Work {
            step: self.id,
            upload: Some((&self.batch, bytemuck::cast_slice(&metadata.words))),
            commands: &commands,
            timed: self.timed.then_some(&operations),
            answers: &places,
        })?;
        let names = self.names.clone();
        Ok(Ticket::new(async move {
            let came = ticket.await?;
            let times = came.milliseconds.into_iter();
            let times = times.map(|(operation, milliseconds)| (names[operation], milliseconds));
            Ok(submission.output(&came.bytes, memory::values, times))
        }))
    }
}
