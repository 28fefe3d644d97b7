//! A step of the wgpu backend: dispatches over bind groups that are created at compile time, encoded again for each
//! submission.
//!
//! Every submission is one command buffer: the batch's metadata is uploaded first, the results are copied last. Operations
//! are encoded in `operations`, `kda`, `attention`, `experts` and `answers`.

use std::ops::Range;
use std::sync::Arc;

use bytemuck::NoUninit;

use super::Shared;
use super::memory::{self, Memory};
use super::pipelines::{self, Bind, Parameters, Pipeline, Program};
use super::readback::{self, Spare};
use super::timing::{self, Clock, Timing};
use super::weights::Part;
use crate::backend::check::Demands;
use crate::backend::gpu::answers::{Answer, Asked, Submission};
use crate::backend::gpu::batch_metadata::{BatchMetadata, MetadataLayout};
use crate::backend::handles::Uses;
use crate::backend::{
    AllGather, Batch, Capacity, LatentPool, MaybeSend, Result, StatePool, Step, StepOutput, Tensor,
    Ticket, Weight,
};

/// The number of workgroups of a dispatch for a batch; it is skipped if any dimension is 0.
trait Size: Fn(&BatchMetadata) -> [u32; 3] + MaybeSend {}
impl<F: Fn(&BatchMetadata) -> [u32; 3] + MaybeSend> Size for F {}

/// The number of bytes of a copy for a batch; none are copied if it is 0.
trait Bytes: Fn(&BatchMetadata) -> u64 + MaybeSend {}
impl<F: Fn(&BatchMetadata) -> u64 + MaybeSend> Bytes for F {}

/// A dispatch with its pipeline and bind group.
pub(super) struct Launch {
    pipeline: Pipeline,
    group: wgpu::BindGroup,
}

/// Creates the launches of one window of a prefill, which are cached.
pub(super) trait MakeLaunches:
    Fn(&mut Encoder, usize) -> Result<Vec<Launch>> + MaybeSend
{
}
impl<F: Fn(&mut Encoder, usize) -> Result<Vec<Launch>> + MaybeSend> MakeLaunches for F {}

/// The size of each of these launches.
pub(super) type LaunchSizes =
    Box<dyn Fn(&crate::backend::gpu::batch_metadata::Window) -> Vec<[u32; 3]> + Send>;

/// The windows of a batch, one after the other.
pub(super) struct Windows {
    /// The windows of this batch that the operation processes.
    pub(super) range: fn(&BatchMetadata) -> std::ops::Range<usize>,
    pub(super) sizes: LaunchSizes,
    pub(super) make: Box<dyn MakeLaunches>,
    pub(super) made: Vec<Vec<Launch>>,
}

enum Command {
    Dispatch(Launch, Box<dyn Size>),
    Several(Windows),
    /// Copies this number of bytes of a buffer into another.
    Copy(wgpu::Buffer, wgpu::Buffer, Box<dyn Bytes>),
    /// Rows that are read back.
    Answer(wgpu::Buffer, Answer),
}

/// What encoding a step needs: the device, the memory, and the step's parameters.
pub(super) struct Encoder {
    pub(super) shared: Arc<Shared>,
    pub(super) capacity: Capacity,
    parameters: Parameters,
    /// The batch's metadata on the device.
    metadata: wgpu::Buffer,
}

impl Encoder {
    /// A dispatch with pipeline, parameters and bindings, created once.
    pub(super) fn launch(
        &mut self,
        program: Program,
        params: &impl NoUninit,
        binds: &[Bind<'_>],
    ) -> Result<Launch> {
        let gpu = &self.shared.gpu;
        let mut all = vec![Bind::Read(1, &self.metadata)];
        all.extend_from_slice(binds);
        let what = program.entry;
        let pipeline = {
            let mut pipelines = self
                .shared
                .pipelines
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            pipelines.get(gpu, program, &all)?
        };
        let (page, offset) = self.parameters.keep(gpu, bytemuck::bytes_of(params))?;
        let params = pipelines::parameter_binding(&page, offset);
        let group = pipelines::bind_group(gpu, &pipeline, what, params, &all)?;
        Ok(Launch { pipeline, group })
    }

    pub(super) fn with_memory<R>(&self, f: impl FnOnce(&mut Memory) -> Result<R>) -> Result<R> {
        f(&mut self.shared.memory())
    }

    pub(super) fn tensor(&self, tensor: Tensor) -> Result<wgpu::Buffer> {
        self.with_memory(|memory| memory.tensor(tensor).cloned())
    }

    pub(super) fn scratch(&self, name: &'static str, elements: usize) -> Result<wgpu::Buffer> {
        let make = memory::make(&self.shared.gpu);
        self.with_memory(|memory| memory.scratch(&make, name, 4 * elements as u64))
    }

    /// The buffer of a vector: a norm's weight, a bias.
    pub(super) fn small(&self, operation: &'static str, weight: Weight) -> Result<wgpu::Buffer> {
        self.with_memory(|memory| memory.weight(weight)?.small(operation).cloned())
    }

    /// The buffers of a matrix, in the order of its rows.
    pub(super) fn parts(&self, operation: &'static str, weight: Weight) -> Result<Vec<Part>> {
        self.with_memory(|memory| Ok(memory.weight(weight)?.matrix(operation)?.to_vec()))
    }

    /// Maximum number of rows for the form for few rows. On a GPU that form reads the weights again for each row; a software
    /// adapter computes every row of a tile, used or not.
    pub(super) fn few(&self) -> usize {
        if self.shared.gpu.software { 10 } else { 4 }
    }
}

/// Workgroups of 64 threads for this number of elements, folded into two dimensions.
pub(super) fn flat(elements: usize) -> [u32; 3] {
    let groups = elements.div_ceil(64);
    let x = groups.min(32768);
    [x as u32, groups.div_ceil(x.max(1)) as u32, 1]
}

pub(super) struct WgpuStep {
    pub(super) encoder: Encoder,
    pub(super) metadata_layout: MetadataLayout,
    spare: Arc<Spare>,
    demands: Demands,
    uses: Uses,
    names: Vec<&'static str>,
    /// Each with the index of its operation's name.
    commands: Vec<(usize, Command)>,
    /// The buffers of times, once timing was requested, and whether it is on.
    timing: Option<Timing>,
    timed: bool,
}

impl WgpuStep {
    pub(super) fn new(
        shared: Arc<Shared>,
        capacity: Capacity,
        demands: Demands,
        uses: Uses,
    ) -> Result<Self> {
        let block_tokens = shared.memory().block_tokens();
        let metadata_layout = MetadataLayout {
            window: shared.window,
            span: shared.span,
            most_spans: usize::MAX,
            block_tokens,
        };
        let metadata = shared.gpu.buffer(
            "a step's batch",
            4 * metadata_layout.words(&capacity, &demands.draws()) as u64,
        )?;
        Ok(Self {
            encoder: Encoder {
                shared,
                capacity,
                parameters: Parameters::default(),
                metadata,
            },
            metadata_layout,
            spare: Arc::default(),
            demands,
            uses,
            names: Vec::new(),
            commands: Vec::new(),
            timing: None,
            timed: false,
        })
    }

    pub(super) fn name(&mut self, name: &'static str) {
        self.names.push(name);
    }

    /// The buffer of a tensor.
    pub(super) fn tensor(&self, tensor: Tensor) -> Result<wgpu::Buffer> {
        self.encoder.tensor(tensor)
    }

    /// The states and the convolution states of a layer.
    pub(super) fn states(
        &self,
        pool: &StatePool,
        layer: usize,
    ) -> Result<(wgpu::Buffer, wgpu::Buffer)> {
        self.encoder
            .with_memory(|memory| memory.states(pool, layer).cloned())
    }

    /// The latents of a layer.
    pub(super) fn latents(&self, pool: &LatentPool, layer: usize) -> Result<wgpu::Buffer> {
        self.encoder
            .with_memory(|memory| memory.latents(pool, layer).cloned())
    }

    fn push_command(&mut self, command: Command) {
        self.commands
            .push((self.names.len().saturating_sub(1), command));
    }

    /// Encodes one dispatch.
    pub(super) fn dispatch(
        &mut self,
        program: Program,
        params: &impl NoUninit,
        binds: &[Bind<'_>],
        size: impl Fn(&BatchMetadata) -> [u32; 3] + MaybeSend + 'static,
    ) -> Result<()> {
        let launch = self.encoder.launch(program, params, binds)?;
        self.push_command(Command::Dispatch(launch, Box::new(size)));
        Ok(())
    }

    /// Returns these rows in every submission, with their values at this point of the program.
    pub(super) fn answer(&mut self, buffer: wgpu::Buffer, answer: Answer) {
        self.push_command(Command::Answer(buffer, answer));
    }

    /// Encodes a copy of the first bytes of a buffer.
    pub(super) fn copy(
        &mut self,
        from: &wgpu::Buffer,
        to: &wgpu::Buffer,
        bytes: impl Fn(&BatchMetadata) -> u64 + MaybeSend + 'static,
    ) {
        self.push_command(Command::Copy(from.clone(), to.clone(), Box::new(bytes)));
    }

    pub(super) fn several(&mut self, windows: Windows) {
        self.push_command(Command::Several(windows));
    }

    /// Creates the launches of all windows of a batch that have none so far.
    fn make_windows(&mut self, metadata: &BatchMetadata) -> Result<()> {
        for (_, command) in &mut self.commands {
            if let Command::Several(windows) = command {
                for i in windows.made.len()..(windows.range)(metadata).end {
                    windows.made.push((windows.make)(&mut self.encoder, i)?);
                }
            }
        }
        Ok(())
    }

    /// Encodes all commands; `answers` has the offset of each result in `back`, and `clock` writes its times after them.
    fn encode(
        &self,
        metadata: &BatchMetadata,
        back: &wgpu::Buffer,
        answers: &[Range<u64>],
        clock: Option<&mut Clock<'_>>,
    ) -> wgpu::CommandEncoder {
        let gpu = &self.encoder.shared.gpu;
        let descriptor = wgpu::CommandEncoderDescriptor::default();
        let mut encoder = gpu.device.create_command_encoder(&descriptor);
        let mut passes = Passes {
            open: None,
            clock,
            operation: 0,
        };
        let mut answers = answers.iter();
        for (operation, command) in &self.commands {
            passes.enter(*operation);
            match command {
                Command::Dispatch(launch, size) => {
                    passes.dispatch(&mut encoder, launch, size(metadata));
                }
                Command::Several(windows) => {
                    for i in (windows.range)(metadata) {
                        let sizes = (windows.sizes)(&metadata.windows[i]);
                        for (launch, size) in windows.made[i].iter().zip(sizes) {
                            passes.dispatch(&mut encoder, launch, size);
                        }
                    }
                }
                Command::Copy(source, target, bytes) => {
                    passes.open = None;
                    let bytes = bytes(metadata);
                    if bytes > 0 {
                        encoder.copy_buffer_to_buffer(source, 0, target, 0, bytes);
                    }
                }
                Command::Answer(buffer, _) => {
                    passes.open = None;
                    if let Some(to) = answers.next().filter(|to| !to.is_empty()) {
                        let bytes = to.end - to.start;
                        encoder.copy_buffer_to_buffer(buffer, 0, back, to.start, bytes);
                    }
                }
            }
        }
        passes.open = None;
        if let Some(clock) = passes.clock {
            clock.resolve(&mut encoder, back);
        }
        encoder
    }
}

/// The passes of one submission: as few as copies between dispatches allow, or one per operation when timed.
struct Passes<'a, 'c> {
    open: Option<wgpu::ComputePass<'static>>,
    clock: Option<&'a mut Clock<'c>>,
    operation: usize,
}

impl Passes<'_, '_> {
    /// Sets the operation that the next dispatches belong to.
    fn enter(&mut self, operation: usize) {
        if self.clock.is_some() && operation != self.operation {
            self.open = None;
        }
        self.operation = operation;
    }

    /// Encodes one dispatch, into the pass that is open or a new one.
    fn dispatch(
        &mut self,
        encoder: &mut wgpu::CommandEncoder,
        launch: &Launch,
        [x, y, z]: [u32; 3],
    ) {
        if x == 0 || y == 0 || z == 0 {
            return;
        }
        let (clock, operation) = (&mut self.clock, self.operation);
        let pass = self.open.get_or_insert_with(|| {
            let descriptor = wgpu::ComputePassDescriptor {
                label: None,
                timestamp_writes: clock.as_mut().and_then(|clock| clock.pass(operation)),
            };
            encoder.begin_compute_pass(&descriptor).forget_lifetime()
        });
        pass.set_pipeline(&launch.pipeline.pipeline);
        pass.set_bind_group(0, &launch.group, &[]);
        pass.dispatch_workgroups(x, y, z);
    }
}

impl WgpuStep {
    pub(super) fn encode_all_gather(&mut self, op: AllGather) -> Result<()> {
        self.name("all_gather");
        let (input, output) = (self.tensor(op.input)?, self.tensor(op.output)?);
        let AllGather { input: rows, .. } = op;
        self.copy(&input, &output, move |metadata| {
            4 * (metadata.count(rows.rows) * rows.width) as u64
        });
        Ok(())
    }
}

impl Drop for WgpuStep {
    fn drop(&mut self) {
        self.uses = Uses::default();
        self.encoder.shared.memory().sweep();
    }
}

impl Step for WgpuStep {
    fn time(&mut self, on: bool) -> Result<()> {
        if self.timing.is_none() && on {
            self.timing = Some(Timing::new(&self.encoder.shared.gpu)?);
        }
        self.timed = on;
        Ok(())
    }

    fn operations(&self) -> &[&'static str] {
        &self.names
    }

    fn submit(&mut self, batch: &Batch) -> Result<Ticket<StepOutput>> {
        let asked = Asked {
            capacity: &self.encoder.capacity,
            demands: &self.demands,
            layout: &self.metadata_layout,
            splits: 1,
            metadata_bytes: self.encoder.metadata.size(),
        };
        let answers = self
            .commands
            .iter()
            .filter_map(|(_, command)| match command {
                Command::Answer(_, answer) => Some(*answer),
                _ => None,
            });
        let submission = Submission::new(batch, &asked, answers, |_| 4)?;
        let metadata = &submission.metadata;
        let mut bytes = 0;
        let mut ranges = Vec::new();
        for len in submission.lengths() {
            ranges.push(bytes..bytes + len as u64);
            bytes += len as u64;
        }
        let answered = bytes as usize / 4;
        let shared = Arc::clone(&self.encoder.shared);
        shared.memory().check_uses(&self.uses)?;
        self.make_windows(metadata)?;
        // Every command may need a pass of its own.
        let mut timing = self.timing.take();
        let passes = self.commands.len();
        let clock = match &mut timing {
            Some(timing) if self.timed => timing.clock(&shared.gpu, passes, bytes).map(Some),
            _ => Ok(None),
        };
        let submitted = clock.and_then(|mut clock| {
            let bytes = bytes + clock.as_ref().map_or(0, Clock::bytes);
            let back = self.spare.take(&shared, bytes)?;
            let read = readback::submit(&shared, &self.spare, "a step", back, bytes, |back| {
                let words = bytemuck::cast_slice(&metadata.words);
                let queue = &shared.gpu.queue;
                queue.write_buffer(&self.encoder.metadata, 0, words);
                self.encode(metadata, back, &ranges, clock.as_mut())
            })?;
            Ok((read, clock.map_or_else(Vec::new, Clock::timed)))
        });
        self.timing = timing;
        let (read, timed) = submitted?;
        let timed: Vec<_> = timed.into_iter().map(|i| self.names[i]).collect();
        let tick = shared.gpu.tick.unwrap_or_default();
        Ok(Ticket::new(async move {
            let words = read.await?;
            let times = words.get(answered..).unwrap_or_default();
            let times = timed.into_iter().zip(timing::milliseconds(times, tick));
            Ok(submission.output(bytemuck::cast_slice(&words), memory::values, times))
        }))
    }
}
