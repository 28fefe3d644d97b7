//! Selects the function that records each operation, and has those for operations on rows: embedding, norm, products,
//! activation, sum.

use super::params::params;
use super::pipelines::{Bind, Program};
use super::step::{WgpuStep, flat};
use crate::backend::gpu::answers::DRAWN_WORDS;
use crate::backend::gpu::batch_metadata::count_word;
use crate::backend::{Add, AddNorm, Embed, Linear, Op, Result, RmsNorm, Rows, Swiglu, Weight};

params! {
    Add of "add" { width: u32, rows: u32 }
    AddNorm of "add_norm" { width: u32, eps: f32, rows: u32 }
    Embed of "embed" { width: u32, stride: u32, first_row: u32, rows: u32, vocabulary: u32 }
    Product of "linear_few", "linear_many" {
        columns: u32, stride: u32, outputs: u32, first: u32, width: u32, rows: u32,
    }
    RmsNorm of "rms_norm" { width: u32, eps: f32, rows: u32, gather: u32 }
    Swiglu of "swiglu" { width: u32, rows: u32 }
}

impl WgpuStep {
    /// Whether a block is run as a whole.
    pub(super) fn takes(op: &Op) -> bool {
        match op {
            Op::AddNorm(both) => both.by_rows(),
            Op::KdaBlock(_) | Op::MoeBlock(_) => true,
            _ => false,
        }
    }

    /// Appends an operation, which was checked before. Blocks that it does not implement were expanded.
    pub(super) fn push(&mut self, op: &Op) -> Result<()> {
        match *op {
            Op::Embed(op) => self.encode_embed(op),
            Op::RmsNorm(op) => self.encode_rms_norm(op),
            Op::Linear(op) => self.encode_linear(op),
            Op::ShortConv(op) => self.encode_short_conv(op),
            Op::KdaGates(op) => self.encode_kda_gates(op),
            Op::KdaRecurrence(op) => self.encode_kda_recurrence(op),
            Op::GatedNorm(op) => self.encode_gated_norm(op),
            Op::MlaAppend(op) => self.encode_mla_append(op),
            Op::MlaPrefill(op) => self.encode_prefill(op),
            Op::MlaDecode(op) => self.encode_decode(op),
            Op::Route(op) => self.encode_route(op),
            Op::Experts(op) => self.encode_experts(op, None),
            Op::ExpertRows(op) => self.encode_expert_rows(op),
            Op::ExpertsCombine(op) => self.encode_experts_combine(op),
            Op::Swiglu(op) => self.encode_swiglu(op),
            Op::Add(op) => self.encode_add(op),
            // With one rank the tensor is already the sum.
            Op::AllReduce(op) => self.tensor(op.target).map(drop),
            Op::AllGather(op) => self.encode_all_gather(op),
            Op::Select(op) => self.encode_select(op),
            Op::Sample(op) => self.encode_sample(op),
            Op::Probe(tensor) => self.encode_probe(tensor),
            Op::ProbePositions(tensor) => self.encode_probe_positions(tensor),
            Op::TraceKda(op) => self.encode_trace_kda(op),
            Op::TraceGate(op) => self.encode_trace_gate(op),
            Op::TraceRoute(op) => self.encode_trace_route(op),
            Op::TraceState(op) => self.encode_trace_state(op),
            Op::TraceAttention(op) => self.encode_trace_attention(op),
            Op::AddNorm(op) => self.encode_add_norm(op),
            Op::KdaBlock(ref block) => self.encode_kda_block(block),
            Op::MoeBlock(ref block) => self.encode_moe_block(block),
            Op::MlaBlock(_) | Op::MlpBlock(_) => Ok(()),
        }
    }

    pub(super) fn encode_embed(&mut self, op: Embed) -> Result<()> {
        self.name("embed");
        let output = self.tensor(op.output)?;
        let width = op.output.width;
        let drawn = match op.drawn {
            Some(drawn) => self.tensor(drawn)?,
            None => self.encoder.scratch("no drawn tokens", DRAWN_WORDS)?,
        };
        for part in self.encoder.parts("embed", op.weight)? {
            self.dispatch(
                Program::new("embed").with("FORMAT", part.format),
                &params::Embed {
                    width: width as u32,
                    stride: part.vectors,
                    first_row: part.rows.start as u32,
                    rows: part.rows.len() as u32,
                    vocabulary: op.weight.rows as u32,
                },
                &[
                    Bind::Read(2, &part.buffer),
                    Bind::Write(3, &output),
                    Bind::Read(4, &drawn),
                ],
                move |metadata| flat(metadata.tokens * width),
            )?;
        }
        Ok(())
    }

    pub(super) fn encode_rms_norm(&mut self, op: RmsNorm) -> Result<()> {
        self.name("rms_norm");
        let (input, output) = (self.tensor(op.input)?, self.tensor(op.output)?);
        let weight = self.encoder.small("rms_norm", op.weight)?;
        let rows = op.output.rows;
        let gather = u32::from(op.input.rows != rows);
        self.dispatch(
            Program::new("rms_norm"),
            &params::RmsNorm {
                width: op.input.width as u32,
                eps: op.eps,
                rows: count_word(rows),
                gather,
            },
            &[
                Bind::Read(2, &input),
                Bind::Read(3, &weight),
                Bind::Write(4, &output),
            ],
            move |metadata| [metadata.count(rows) as u32, 1, 1],
        )
    }

    pub(super) fn encode_linear(&mut self, op: Linear) -> Result<()> {
        self.name("linear");
        let (input, output) = (self.tensor(op.input)?, self.tensor(op.output)?);
        self.product((&input, op.input.rows), op.weight, &output)
    }

    pub(super) fn encode_swiglu(&mut self, op: Swiglu) -> Result<()> {
        self.name("swiglu");
        let (input, output) = (self.tensor(op.input)?, self.tensor(op.output)?);
        let (width, rows) = (op.output.width, op.output.rows);
        self.dispatch(
            Program::new("swiglu"),
            &params::Swiglu {
                width: width as u32,
                rows: count_word(rows),
            },
            &[Bind::Read(2, &input), Bind::Write(3, &output)],
            move |metadata| flat(metadata.count(rows) * width),
        )
    }

    pub(super) fn encode_add(&mut self, op: Add) -> Result<()> {
        self.name("add");
        let source = self.tensor(op.source)?;
        let target = self.tensor(op.target)?;
        let (width, rows) = (op.target.width, op.target.rows);
        self.dispatch(
            Program::new("add"),
            &params::Add {
                width: width as u32,
                rows: count_word(rows),
            },
            &[Bind::Read(2, &source), Bind::Write(3, &target)],
            move |metadata| flat(metadata.count(rows) * width),
        )
    }

    pub(super) fn encode_add_norm(&mut self, op: AddNorm) -> Result<()> {
        self.name("add_norm");
        let (source, target) = (self.tensor(op.source)?, self.tensor(op.target)?);
        let output = self.tensor(op.output)?;
        let weight = self.encoder.small("add_norm", op.weight)?;
        let rows = op.target.rows;
        self.dispatch(
            Program::new("add_norm"),
            &params::AddNorm {
                width: op.target.width as u32,
                eps: op.eps,
                rows: count_word(rows),
            },
            &[
                Bind::Read(2, &source),
                Bind::Read(3, &weight),
                Bind::Write(4, &target),
                Bind::Write(5, &output),
            ],
            move |metadata| [metadata.count(rows) as u32, 1, 1],
        )
    }

    /// `output = input weight^T`, over every buffer of the weight, in the form for few rows or for many.
    pub(super) fn product(
        &mut self,
        input: (&wgpu::Buffer, Rows),
        weight: Weight,
        output: &wgpu::Buffer,
    ) -> Result<()> {
        let few = self.encoder.few();
        let (input, rows) = input;
        for part in self.encoder.parts("linear", weight)? {
            let params = params::Product {
                columns: weight.columns as u32,
                stride: part.vectors,
                outputs: part.rows.len() as u32,
                first: part.rows.start as u32,
                width: weight.rows as u32,
                rows: count_word(rows),
            };
            let binds = [
                Bind::Read(2, input),
                Bind::Read(3, &part.buffer),
                Bind::Write(4, output),
            ];
            let groups = params.outputs.div_ceil(32);
            let program = Program::new("linear_few").with("FORMAT", part.format);
            self.dispatch(program, &params, &binds, move |metadata| {
                let rows = metadata.count(rows);
                [groups, if rows <= few { rows as u32 } else { 0 }, 1]
            })?;
            let program = Program::new("linear_many")
                .with("FORMAT", part.format)
                .with("THREADS", 256);
            self.dispatch(program, &params, &binds, move |metadata| {
                let rows = metadata.count(rows);
                let tiles = rows.div_ceil(32) as u32;
                [groups.div_ceil(2), if rows > few { tiles } else { 0 }, 1]
            })?;
        }
        Ok(())
    }
}
