//! A step of the wgpu backend: dispatches over bind groups made while recording, encoded anew for each submission.
//!
//! Every submission is one command buffer: the batch's image goes up first, the answers come down last. Attention and
//! experts, which take several dispatches each, are recorded in files of their own.

use std::sync::Arc;

use super::image::{Image, Plan, count_word};
use super::memory::Memory;
use super::pipelines::{self, Bind, Parameters, Pipeline, Program};
use super::readback::{Read, Spare};
use super::{Shared, records};
use crate::backend::check::Demands;
use crate::backend::{
    Add, AllGather, AllReduce, Batch, Capacity, Choice, Embed, Experts, Form, GatedNorm, KdaGates,
    KdaRecurrence, Linear, MlaAppend, MlaAttention, Result, RmsNorm, Route, Rows, Select,
    ShortConv, Step, StepOutput, Swiglu, Tensor, Ticket,
};
use crate::error::BackendError;

/// How many workgroups a dispatch takes for this batch; any 0 leaves it out.
type Size = Box<dyn Fn(&Image) -> [u32; 3] + Send>;

/// A dispatch with all that it is given.
pub(super) struct Launch {
    pipeline: Pipeline,
    group: wgpu::BindGroup,
}

/// Makes the launches of one window of a prefill; they are kept once made.
pub(super) type MakeLaunches = Box<dyn Fn(&mut Recorder, usize) -> Result<Vec<Launch>> + Send>;
/// The size of each of them.
pub(super) type LaunchSizes = Box<dyn Fn(&super::image::Window) -> Vec<[u32; 3]> + Send>;

/// The windows of a batch, one after the other.
pub(super) struct Windows {
    /// The windows of this batch that the operation works on.
    pub(super) range: fn(&Image) -> std::ops::Range<usize>,
    pub(super) sizes: LaunchSizes,
    pub(super) make: MakeLaunches,
    pub(super) made: Vec<Vec<Launch>>,
}

enum Command {
    Dispatch(Launch, Size),
    Several(Windows),
    /// Copies a tensor's rows into another.
    Copy(wgpu::Buffer, wgpu::Buffer, Tensor),
    /// Rows that come back.
    Answer(wgpu::Buffer, Answer),
}

/// What comes back, a row of so many words each.
#[derive(Clone, Copy)]
enum Answer {
    Probe(Tensor),
    Logits(Tensor),
    Choices { candidates: usize },
}

impl Answer {
    fn words(self, image: &Image) -> usize {
        match self {
            Self::Probe(tensor) | Self::Logits(tensor) => image.count(tensor.rows) * tensor.width,
            Self::Choices { candidates } => image.outputs * (4 + 2 * candidates),
        }
    }
}

/// What recording needs: the device, the memory, and the parameters kept for the step.
pub(super) struct Recorder {
    pub(super) shared: Arc<Shared>,
    pub(super) capacity: Capacity,
    parameters: Parameters,
    /// The batch's image on the device.
    image: wgpu::Buffer,
}

impl Recorder {
    /// Everything that a dispatch is given, made once.
    pub(super) fn launch(
        &mut self,
        program: Program,
        params: &[u32],
        binds: &[Bind<'_>],
    ) -> Result<Launch> {
        let gpu = &self.shared.gpu;
        let mut all = vec![Bind::Read(1, &self.image)];
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
        let (page, offset) = self.parameters.keep(gpu, params)?;
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
        self.with_memory(|memory| memory.scratch(&self.shared.gpu, name, elements))
    }

    /// The buffer of a norm's weight, a bias and the like.
    pub(super) fn small(
        &self,
        operation: &'static str,
        weight: crate::backend::Weight,
    ) -> Result<wgpu::Buffer> {
        self.with_memory(|memory| memory.weight(weight)?.small(operation).cloned())
    }

    /// Rows at most that the form for few rows takes: on a GPU it reads weights again for each, and a processor that
    /// plays GPU pays for every row of a tile, wanted or not.
    pub(super) fn few(&self) -> usize {
        if self.shared.gpu.software { 10 } else { 4 }
    }
}

/// Workgroups of 64 threads for so many elements, folded into two dimensions.
pub(super) fn flat(elements: usize) -> [u32; 3] {
    let groups = elements.div_ceil(64);
    let x = groups.min(32768);
    [x as u32, groups.div_ceil(x.max(1)) as u32, 1]
}

pub(super) struct WgpuStep {
    pub(super) recorder: Recorder,
    plan: Plan,
    spare: Arc<Spare>,
    pub(super) demands: Demands,
    names: Vec<&'static str>,
    commands: Vec<Command>,
}

impl WgpuStep {
    pub(super) fn new(shared: Arc<Shared>, capacity: Capacity) -> Result<Self> {
        let block_tokens = {
            let memory = shared.memory();
            let pools = memory.latents.iter();
            pools.map(|pool| pool.layout.block_tokens).max()
        };
        let plan = Plan {
            window: shared.window,
            block_tokens: block_tokens.unwrap_or(1),
        };
        let image = shared
            .gpu
            .buffer("a step's batch", 4 * plan.words(&capacity) as u64)?;
        Ok(Self {
            recorder: Recorder {
                shared,
                capacity,
                parameters: Parameters::default(),
                image,
            },
            plan,
            spare: Arc::default(),
            demands: Demands::default(),
            names: Vec::new(),
            commands: Vec::new(),
        })
    }

    pub(super) fn name(&mut self, name: &'static str) {
        self.names.push(name);
    }

    /// Records one dispatch.
    pub(super) fn dispatch(
        &mut self,
        program: Program,
        params: &[u32],
        binds: &[Bind<'_>],
        size: impl Fn(&Image) -> [u32; 3] + Send + 'static,
    ) -> Result<()> {
        let launch = self.recorder.launch(program, params, binds)?;
        self.commands
            .push(Command::Dispatch(launch, Box::new(size)));
        Ok(())
    }

    pub(super) fn several(&mut self, windows: Windows) {
        self.commands.push(Command::Several(windows));
    }

    /// `output = input weight^T`, over every buffer of the weight, in the form for few rows or for many.
    pub(super) fn product(
        &mut self,
        input: (&wgpu::Buffer, Rows),
        weight: crate::backend::Weight,
        output: &wgpu::Buffer,
    ) -> Result<()> {
        let few = self.recorder.few();
        let (format, stride, parts) = self.recorder.with_memory(|memory| {
            let weight = memory.weight(weight)?.matrix("linear")?;
            let parts = weight.parts.iter();
            let parts: Vec<_> = parts
                .map(|part| (part.buffer.clone(), part.rows.clone()))
                .collect();
            Ok((weight.format, weight.vectors(), parts))
        })?;
        let (input, rows) = input;
        for (buffer, range) in parts {
            let params = [
                weight.columns as u32,
                stride,
                range.len() as u32,
                range.start as u32,
                weight.rows as u32,
                count_word(rows),
            ];
            let binds = [
                Bind::Read(2, input),
                Bind::Read(3, &buffer),
                Bind::Write(4, output),
            ];
            let groups = range.len().div_ceil(32) as u32;
            let program = Program::new("linear_few").with("FORMAT", format);
            self.dispatch(program, &params, &binds, move |image| {
                let rows = image.count(rows);
                [groups, if rows <= few { rows as u32 } else { 0 }, 1]
            })?;
            let program = Program::new("linear_many")
                .with("FORMAT", format)
                .with("THREADS", 256);
            self.dispatch(program, &params, &binds, move |image| {
                let rows = image.count(rows);
                let tiles = rows.div_ceil(32) as u32;
                [groups.div_ceil(2), if rows > few { tiles } else { 0 }, 1]
            })?;
        }
        Ok(())
    }

    /// Encodes all commands; `answers` says where each answer begins in `back`.
    fn encode(
        &mut self,
        image: &Image,
        back: &wgpu::Buffer,
        answers: &[u64],
    ) -> Result<wgpu::CommandEncoder> {
        let shared = Arc::clone(&self.recorder.shared);
        for command in &mut self.commands {
            if let Command::Several(windows) = command {
                for i in windows.made.len()..(windows.range)(image).end {
                    windows.made.push((windows.make)(&mut self.recorder, i)?);
                }
            }
        }
        let commands = &self.commands;
        shared.gpu.guarded("a step", 0, || {
            let descriptor = wgpu::CommandEncoderDescriptor::default();
            let mut encoder = shared.gpu.device.create_command_encoder(&descriptor);
            let mut pass = None;
            let mut answers = answers.iter();
            for command in commands {
                match command {
                    Command::Dispatch(launch, size) => {
                        dispatch(&mut encoder, &mut pass, launch, size(image));
                    }
                    Command::Several(windows) => {
                        for i in (windows.range)(image) {
                            let sizes = (windows.sizes)(&image.windows[i]);
                            for (launch, size) in windows.made[i].iter().zip(sizes) {
                                dispatch(&mut encoder, &mut pass, launch, size);
                            }
                        }
                    }
                    Command::Copy(source, target, tensor) => {
                        pass = None;
                        let bytes = 4 * (image.count(tensor.rows) * tensor.width) as u64;
                        if bytes > 0 {
                            encoder.copy_buffer_to_buffer(source, 0, target, 0, bytes);
                        }
                    }
                    Command::Answer(buffer, answer) => {
                        pass = None;
                        let bytes = 4 * answer.words(image) as u64;
                        if let (Some(to), true) = (answers.next(), bytes > 0) {
                            encoder.copy_buffer_to_buffer(buffer, 0, back, *to, bytes);
                        }
                    }
                }
            }
            drop(pass);
            encoder
        })
    }
}

/// Encodes one dispatch, into the pass that is open or a new one.
fn dispatch(
    encoder: &mut wgpu::CommandEncoder,
    pass: &mut Option<wgpu::ComputePass<'static>>,
    launch: &Launch,
    [x, y, z]: [u32; 3],
) {
    if x == 0 || y == 0 || z == 0 {
        return;
    }
    let pass = pass.get_or_insert_with(|| {
        encoder
            .begin_compute_pass(&wgpu::ComputePassDescriptor::default())
            .forget_lifetime()
    });
    pass.set_pipeline(&launch.pipeline.pipeline);
    pass.set_bind_group(0, &launch.group, &[]);
    pass.dispatch_workgroups(x, y, z);
}

impl Step for WgpuStep {
    fn embed(&mut self, op: Embed) -> Result<()> {
        op.check()?;
        self.demands.vocabulary = Some(op.weight.rows);
        self.name("embed");
        let output = self.recorder.tensor(op.output)?;
        let (format, stride, parts) = self.recorder.with_memory(|memory| {
            let weight = memory.weight(op.weight)?.matrix("embed")?;
            let parts = weight.parts.iter();
            let parts: Vec<_> = parts
                .map(|part| (part.buffer.clone(), part.rows.clone()))
                .collect();
            Ok((weight.format, weight.vectors(), parts))
        })?;
        let width = op.output.width;
        for (buffer, rows) in parts {
            self.dispatch(
                Program::new("embed").with("FORMAT", format),
                &[width as u32, stride, rows.start as u32, rows.len() as u32],
                &[Bind::Read(2, &buffer), Bind::Write(3, &output)],
                move |image| flat(image.tokens * width),
            )?;
        }
        Ok(())
    }

    fn rms_norm(&mut self, op: RmsNorm) -> Result<()> {
        op.check()?;
        self.name("rms_norm");
        let (input, output) = (
            self.recorder.tensor(op.input)?,
            self.recorder.tensor(op.output)?,
        );
        let weight = self.recorder.small("rms_norm", op.weight)?;
        let rows = op.output.rows;
        let gather = u32::from(op.input.rows != rows);
        self.dispatch(
            Program::new("rms_norm"),
            &[
                op.input.width as u32,
                op.eps.to_bits(),
                count_word(rows),
                gather,
            ],
            &[
                Bind::Read(2, &input),
                Bind::Read(3, &weight),
                Bind::Write(4, &output),
            ],
            move |image| [image.count(rows) as u32, 1, 1],
        )
    }

    fn linear(&mut self, op: Linear) -> Result<()> {
        op.check()?;
        self.name("linear");
        let (input, output) = (
            self.recorder.tensor(op.input)?,
            self.recorder.tensor(op.output)?,
        );
        self.product((&input, op.input.rows), op.weight, &output)
    }

    fn short_conv(&mut self, op: ShortConv) -> Result<()> {
        op.check()?;
        self.demands.states = Some(op.pool.layout);
        self.name("short_conv");
        let (input, output) = (
            self.recorder.tensor(op.input)?,
            self.recorder.tensor(op.output)?,
        );
        let weight = self.recorder.small("short_conv", op.weight)?;
        let (stride, tails) = self.recorder.with_memory(|memory| {
            let stride = memory.weight(op.weight)?.stride;
            Ok((stride, memory.states(&op.pool, op.layer)?.1.clone()))
        })?;
        let channels = op.input.width;
        let params = [channels as u32, op.pool.layout.taps as u32, stride as u32];
        let (input, tails) = (Bind::Read(2, &input), Bind::Write(4, &tails));
        self.dispatch(
            Program::entry("short_conv", "convolve"),
            &params,
            &[
                input,
                Bind::Read(3, &weight),
                tails,
                Bind::Write(5, &output),
            ],
            move |image| flat(image.tokens * channels),
        )?;
        if op.pool.layout.taps < 2 {
            return Ok(());
        }
        self.dispatch(
            Program::entry("short_conv", "keep_tails"),
            &params,
            &[input, tails],
            move |image| flat(image.pieces * channels),
        )
    }

    fn kda_gates(&mut self, op: KdaGates) -> Result<()> {
        op.check()?;
        self.name("kda_gates");
        let recorder = &self.recorder;
        let (decay, write) = (recorder.tensor(op.decay)?, recorder.tensor(op.write)?);
        let (gates, beta) = (recorder.tensor(op.gates)?, recorder.tensor(op.beta)?);
        let a_log = recorder.small("kda_gates", op.a_log)?;
        let dt_bias = recorder.small("kda_gates", op.dt_bias)?;
        let channels = op.decay.width;
        self.dispatch(
            Program::new("kda_gates"),
            &[channels as u32, op.write.width as u32],
            &[
                Bind::Read(2, &decay),
                Bind::Read(3, &write),
                Bind::Read(4, &a_log),
                Bind::Read(5, &dt_bias),
                Bind::Write(6, &gates),
                Bind::Write(7, &beta),
            ],
            move |image| flat(image.tokens * channels),
        )
    }

    fn kda_recurrence(&mut self, op: KdaRecurrence) -> Result<()> {
        op.check()?;
        self.demands.states = Some(op.pool.layout);
        self.name("kda_recurrence");
        let layout = op.pool.layout;
        let (heads, k, v) = (layout.value_heads, layout.key_width, layout.value_width);
        /// `[KEY_WIDTH, 16]` f32 beside 3 KiB of other things fits 16 KiB.
        const WIDEST: usize = 200;
        if k > WIDEST {
            return Err(BackendError::Unsupported {
                backend: "wgpu",
                what: format!("keys {k} wide; the widest are {WIDEST}"),
            });
        }
        let recorder = &self.recorder;
        let (qkv, gates) = (recorder.tensor(op.qkv)?, recorder.tensor(op.gates)?);
        let (beta, output) = (recorder.tensor(op.beta)?, recorder.tensor(op.output)?);
        let states =
            recorder.with_memory(|memory| Ok(memory.states(&op.pool, op.layer)?.0.clone()))?;
        let form = match op.form {
            Form::Auto => 0,
            Form::Chunk => 1,
            Form::Step => 2,
        };
        let params = [layout.key_heads, heads, k, v, form].map(|word| word as u32);
        let [qkv, gates, beta] =
            [(2, &qkv), (3, &gates), (4, &beta)].map(|(number, buffer)| Bind::Read(number, buffer));
        let heads = heads as u32;
        if op.form != Form::Step {
            let every = op.form == Form::Chunk;
            let elements = (3 * 16 * k + k + 2 * 16 * 16) * heads as usize;
            let chunks = Plan::chunks(&recorder.capacity);
            let workspace = recorder.scratch("chunks of a recurrence", chunks * elements)?;
            self.dispatch(
                Program::entry("kda_chunk", "prepare"),
                &params,
                &[qkv, gates, beta, Bind::Write(6, &workspace)],
                move |image| {
                    let chunks = if every {
                        image.chunks
                    } else {
                        image.several_chunks
                    };
                    [chunks as u32, heads, 1]
                },
            )?;
            self.dispatch(
                Program::entry("kda_chunk", "scan").with("KEY_WIDTH", k as u32),
                &params,
                &[
                    qkv,
                    beta,
                    Bind::Read(5, &workspace),
                    Bind::Write(7, &states),
                    Bind::Write(8, &output),
                ],
                move |image| {
                    let some = every || image.several_chunks > 0;
                    let pieces = if some { image.pieces as u32 } else { 0 };
                    [v.div_ceil(16) as u32, heads, pieces]
                },
            )?;
        }
        if op.form != Form::Chunk {
            let every = op.form == Form::Step;
            self.dispatch(
                Program::new("kda_step"),
                &params,
                &[
                    qkv,
                    gates,
                    beta,
                    Bind::Write(5, &states),
                    Bind::Write(6, &output),
                ],
                move |image| {
                    let some = every || image.short_pieces > 0;
                    let pieces = if some { image.pieces as u32 } else { 0 };
                    [v.div_ceil(8) as u32, heads, pieces]
                },
            )?;
        }
        Ok(())
    }

    fn gated_norm(&mut self, op: GatedNorm) -> Result<()> {
        op.check()?;
        self.name("gated_norm");
        let recorder = &self.recorder;
        let (input, gate) = (recorder.tensor(op.input)?, recorder.tensor(op.gate)?);
        let weight = recorder.small("gated_norm", op.weight)?;
        let output = recorder.tensor(op.output)?;
        let (width, rows) = (op.weight.rows, op.input.rows);
        let heads = (op.input.width / width) as u32;
        self.dispatch(
            Program::new("gated_norm"),
            &[heads, width as u32, op.eps.to_bits()],
            &[
                Bind::Read(2, &input),
                Bind::Read(3, &gate),
                Bind::Read(4, &weight),
                Bind::Write(5, &output),
            ],
            move |image| [image.count(rows) as u32, heads, 1],
        )
    }

    fn mla_append(&mut self, op: MlaAppend) -> Result<()> {
        op.check()?;
        self.demands.latents = Some(op.pool.layout);
        self.name("mla_append");
        let layout = op.pool.layout;
        let input = self.recorder.tensor(op.input)?;
        let weight = self.recorder.small("mla_append", op.weight)?;
        let latents = self
            .recorder
            .with_memory(|memory| memory.latents(&op.pool, op.layer).cloned())?;
        let [latent, rope, tokens] =
            [layout.latent, layout.rope, layout.block_tokens].map(|word| word as u32);
        self.dispatch(
            Program::new("mla_append"),
            &[latent, rope, tokens, op.eps.to_bits()],
            &[
                Bind::Read(2, &input),
                Bind::Read(3, &weight),
                Bind::Write(4, &latents),
            ],
            |image| [image.tokens as u32, 1, 1],
        )
    }

    fn mla_prefill(&mut self, op: MlaAttention) -> Result<()> {
        self.record_prefill(op)
    }

    fn mla_decode(&mut self, op: MlaAttention) -> Result<()> {
        self.record_decode(op)
    }

    fn route(&mut self, op: Route) -> Result<()> {
        self.record_route(op)
    }

    fn experts(&mut self, op: Experts) -> Result<()> {
        self.record_experts(op)
    }

    fn swiglu(&mut self, op: Swiglu) -> Result<()> {
        op.check()?;
        self.name("swiglu");
        let (input, output) = (
            self.recorder.tensor(op.input)?,
            self.recorder.tensor(op.output)?,
        );
        let (width, rows) = (op.output.width, op.output.rows);
        self.dispatch(
            Program::new("swiglu"),
            &[width as u32, count_word(rows)],
            &[Bind::Read(2, &input), Bind::Write(3, &output)],
            move |image| flat(image.count(rows) * width),
        )
    }

    fn add(&mut self, op: Add) -> Result<()> {
        op.check()?;
        self.name("add");
        let source = self.recorder.tensor(op.source)?;
        let target = self.recorder.tensor(op.target)?;
        let (width, rows) = (op.target.width, op.target.rows);
        self.dispatch(
            Program::new("add"),
            &[width as u32, count_word(rows)],
            &[Bind::Read(2, &source), Bind::Write(3, &target)],
            move |image| flat(image.count(rows) * width),
        )
    }

    fn all_reduce(&mut self, op: AllReduce) -> Result<()> {
        // One rank: the sum is there already.
        self.recorder.tensor(op.target).map(|_| ())
    }

    fn all_gather(&mut self, op: AllGather) -> Result<()> {
        op.check(1)?;
        self.name("all_gather");
        let (input, output) = (
            self.recorder.tensor(op.input)?,
            self.recorder.tensor(op.output)?,
        );
        self.commands.push(Command::Copy(input, output, op.input));
        Ok(())
    }

    fn select(&mut self, op: Select) -> Result<()> {
        op.check()?;
        self.name("select");
        let logits = self.recorder.tensor(op.logits)?;
        let vocabulary = op.logits.width;
        let candidates = op.candidates.min(vocabulary);
        let slices = vocabulary.div_ceil(1024);
        let outputs = self.recorder.capacity.outputs;
        let record = 4 + 2 * candidates;
        let parts = self
            .recorder
            .scratch("slices of logits", outputs * slices * record)?;
        let choices = self
            .recorder
            .shared
            .gpu
            .buffer("choices", 4 * (outputs * record) as u64)?;
        let params = [vocabulary, candidates, slices].map(|word| word as u32);
        self.dispatch(
            Program::entry("select", "select_slices"),
            &params,
            &[Bind::Read(2, &logits), Bind::Write(3, &parts)],
            move |image| [slices as u32, image.outputs as u32, 1],
        )?;
        self.dispatch(
            Program::entry("select", "select_merge"),
            &params,
            &[
                Bind::Read(2, &logits),
                Bind::Read(4, &parts),
                Bind::Write(5, &choices),
            ],
            |image| [image.outputs as u32, 1, 1],
        )?;
        let answer = Answer::Choices { candidates };
        self.commands.push(Command::Answer(choices, answer));
        if op.keep_rows {
            let answer = Answer::Logits(op.logits);
            self.commands.push(Command::Answer(logits, answer));
        }
        Ok(())
    }

    fn probe(&mut self, tensor: Tensor) -> Result<()> {
        self.name("probe");
        let buffer = self.recorder.tensor(tensor)?;
        self.commands
            .push(Command::Answer(buffer, Answer::Probe(tensor)));
        Ok(())
    }

    fn operations(&self) -> &[&'static str] {
        &self.names
    }

    fn submit(&mut self, batch: &Batch) -> Result<Ticket<StepOutput>> {
        self.demands.check(&self.recorder.capacity, batch)?;
        let image = self.plan.image(batch, self.demands.latents.is_some());
        let buffer = &self.recorder.image;
        if 4 * image.words.len() as u64 > buffer.size() {
            return Err(BackendError::Batch {
                what: "the words of a batch".to_owned(),
                expected: format!(
                    "at most {}: record a step after its pools are made",
                    buffer.size() / 4
                ),
                found: image.words.len().to_string(),
            });
        }
        let mut answers = Vec::new();
        for command in &self.commands {
            if let Command::Answer(_, answer) = command {
                answers.push((*answer, answer.words(&image)));
            }
        }
        let mut bytes = 0;
        let mut places = Vec::with_capacity(answers.len());
        for (_, words) in &answers {
            places.push(bytes);
            bytes += 4 * *words as u64;
        }
        let shared = Arc::clone(&self.recorder.shared);
        let back = self.spare.take(&shared, bytes)?;
        let encoder = self.encode(&image, &back, &places)?;
        shared.gpu.guarded("a batch", 0, || {
            let words = bytemuck::cast_slice(&image.words);
            shared
                .gpu
                .queue
                .write_buffer(&self.recorder.image, 0, words);
        })?;
        let read = Read::submit(&shared, &self.spare, encoder, back, bytes)?;
        let targets: Vec<bool> = batch
            .outputs
            .iter()
            .map(|output| output.target.is_some())
            .collect();
        Ok(Ticket::new(async move {
            Ok(output(read.await?, &answers, &targets))
        }))
    }
}

/// The words of all answers as what a submission gives back.
fn output(words: Vec<u32>, answers: &[(Answer, usize)], targets: &[bool]) -> StepOutput {
    let mut output = StepOutput::default();
    let mut rest = &words[..];
    for (answer, len) in answers {
        let (words, others) = rest.split_at(*len);
        rest = others;
        match answer {
            Answer::Probe(tensor) => output.probes.push(records::values(*tensor, words.to_vec())),
            Answer::Logits(_) => output.logits = records::floats(words.to_vec()),
            Answer::Choices { candidates } => {
                let rows = words.chunks_exact(4 + 2 * candidates).zip(targets);
                output.choices = rows.map(|(words, target)| choice(words, *target)).collect();
            }
        }
    }
    output
}

/// One row: log-normaliser, nothing, whether all was finite, the target's logit, then ids and logits.
fn choice(words: &[u32], target: bool) -> Choice {
    let candidates = words[4..].chunks_exact(2);
    Choice {
        candidates: candidates
            .map(|pair| (pair[0], f32::from_bits(pair[1])))
            .collect(),
        log_normaliser: f32::from_bits(words[0]),
        target_logit: target.then(|| f32::from_bits(words[3])),
        finite: words[2] == 1,
    }
}
