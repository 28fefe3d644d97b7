//! Selects the function that records each operation, and has those for operations on rows: embedding, norm, products,
//! activation, sum.

use super::params;
use super::recurrence::takes_kda_block;
use super::step::{CudaStep, Kernel, kind};
use crate::backend::{Add, AddNorm, Element, Embed, Linear, Op, Result, RmsNorm, Swiglu};

impl CudaStep {
    /// Whether a block is run as a whole.
    pub(super) fn takes(&self, op: &Op) -> bool {
        match op {
            Op::AddNorm(both) => both.by_rows() && both.target.element == Element::Activation,
            Op::KdaBlock(block) => takes_kda_block(block),
            Op::MlaBlock(_) | Op::MoeBlock(_) => true,
            _ => false,
        }
    }

    /// Appends a program's operations, which were checked before. Blocks that it does not implement were expanded.
    pub(super) fn push_all(&mut self, mut ops: &[Op]) -> Result<()> {
        while let [op, rest @ ..] = ops {
            ops = rest;
            match (op, rest) {
                (Op::MoeBlock(block), [Op::AddNorm(norm), rest @ ..])
                    if norm.source == block.output =>
                {
                    self.encode_moe_block(block, Some(norm))?;
                    ops = rest;
                }
                _ => self.push(op)?,
            }
        }
        Ok(())
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
            Op::Experts(op) => self.encode_experts(op, None, None),
            Op::ExpertRows(op) => self.encode_expert_rows(op),
            Op::ExpertsCombine(op) => self.encode_experts_combine(op),
            Op::Swiglu(op) => self.encode_swiglu(op),
            Op::Add(op) => self.encode_add(op),
            Op::AllReduce(op) => self.encode_all_reduce(op),
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
            Op::MoeBlock(ref block) => self.encode_moe_block(block, None),
            Op::MlaBlock(ref block) => self.encode_mla_block(block),
            Op::MlpBlock(_) => Ok(()),
        }
    }

    pub(super) fn encode_embed(&mut self, op: Embed) -> Result<()> {
        self.name("embed");
        let (weight, format) = self.stored(op.weight)?;
        let output = self.tensor(op.output)?;
        let drawn = op.drawn.map(|drawn| self.tensor(drawn)).transpose()?;
        let params = params::Embed {
            batch: &self.batch,
            drawn: drawn.as_ref(),
            weight: &weight,
            format,
            output: &output,
            vocabulary: op.weight.rows,
            width: op.output.width,
        };
        let kernel = Kernel::new("embed", 128, &params);
        self.launch(kernel, |metadata| [metadata.tokens as u32, 1, 1]);
        Ok(())
    }

    pub(super) fn encode_rms_norm(&mut self, op: RmsNorm) -> Result<()> {
        self.name("rms_norm");
        let (input, output) = (self.tensor(op.input)?, self.tensor(op.output)?);
        let (weight, format) = self.stored(op.weight)?;
        let rows = op.output.rows;
        let params = params::RmsNorm {
            batch: &self.batch,
            rows: kind(rows),
            gather: op.input.rows != rows,
            input: &input,
            weight: &weight,
            format,
            output: &output,
            width: op.input.width,
            eps: op.eps,
        };
        let kernel = Kernel::new("rms_norm", 256, &params);
        self.launch(kernel, move |metadata| [metadata.count(rows) as u32, 1, 1]);
        Ok(())
    }

    pub(super) fn encode_linear(&mut self, op: Linear) -> Result<()> {
        self.name("linear");
        self.products(&[op])
    }

    pub(super) fn encode_swiglu(&mut self, op: Swiglu) -> Result<()> {
        self.name("swiglu");
        let (kernel, width, rows) = (self.swiglu_kernel(&op)?, op.output.width, op.output.rows);
        self.launch_each(kernel, rows, width, 256);
        Ok(())
    }

    /// The same for batches that have segments of several tokens: of all rows, because those of single tokens are overwritten
    /// later.
    pub(super) fn encode_several_swiglu(&mut self, op: Swiglu) -> Result<()> {
        self.name("swiglu");
        let (kernel, width) = (self.swiglu_kernel(&op)?, op.output.width);
        self.launch_elements(kernel, 256, move |metadata| {
            let some = metadata.several_rows > 0;
            width * if some { metadata.tokens } else { 0 }
        });
        Ok(())
    }

    fn swiglu_kernel(&self, op: &Swiglu) -> Result<Kernel> {
        let (input, output) = (self.tensor(op.input)?, self.tensor(op.output)?);
        let params = params::Swiglu {
            batch: &self.batch,
            rows: kind(op.output.rows),
            input: &input,
            output: &output,
            width: op.output.width,
        };
        Ok(Kernel::new("swiglu", 256, &params))
    }

    pub(super) fn encode_add(&mut self, op: Add) -> Result<()> {
        self.name("add");
        let (source, target) = (self.tensor(op.source)?, self.tensor(op.target)?);
        let (width, rows) = (op.target.width, op.target.rows);
        let entry = match op.target.element {
            Element::F32 => "add_f32",
            Element::Activation | Element::Index => "add",
        };
        let params = params::Add {
            batch: &self.batch,
            rows: kind(rows),
            source: &source,
            target: &target,
            width,
        };
        let kernel = Kernel::new(entry, 256, &params);
        self.launch_each(kernel, rows, width, 256);
        Ok(())
    }

    pub(super) fn encode_add_norm(&mut self, op: AddNorm) -> Result<()> {
        self.name("add_norm");
        let (source, target) = (self.tensor(op.source)?, self.tensor(op.target)?);
        let output = self.tensor(op.output)?;
        let (weight, format) = self.stored(op.weight)?;
        let rows = op.target.rows;
        let params = params::AddNorm {
            batch: &self.batch,
            rows: kind(rows),
            source: &source,
            target: &target,
            weight: &weight,
            format,
            output: &output,
            width: op.target.width,
            eps: op.eps,
        };
        let kernel = Kernel::new("add_norm", 256, &params);
        self.launch(kernel, move |metadata| [metadata.count(rows) as u32, 1, 1]);
        Ok(())
    }
}
