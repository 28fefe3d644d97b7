//! A step of the CPU backend: one closure per operation over its memory, called in order.

use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;

use super::experts::Stacks;
use super::kda_recurrence::Rows as RecurrenceRows;
use super::latents::Latents;
use super::memory::{CpuWeight, Memory};
use super::mla::Shape;
use super::{
    embed, experts, gated_norm, kda_gates, kda_recurrence, linear, mla_append, mla_decode,
    mla_prefill, rms_norm, route, sample, select, short_conv, swiglu,
};
use crate::backend::check::Demands;
use crate::backend::handles::Uses;
use crate::backend::{
    Add, AllGather, Batch, Capacity, Embed, ExpertRows, Experts, ExpertsCombine, GatedNorm,
    KdaGates, KdaRecurrence, Linear, MlaAppend, MlaAttention, Op, Result, RmsNorm, Route, Rows,
    Sample, Segment, Select, ShortConv, Step, StepOutput, Swiglu, Tensor, TensorValues, Ticket,
};
use crate::error::BackendError;

/// Query, kv_b, widths, latents, layer, segment, output.
type AttentionKernel = fn(&[f32], &CpuWeight, &Shape, &Latents, usize, &Segment, &mut [f32]);

type Operation = Box<dyn Fn(&mut Memory, &Run<'_>, &mut StepOutput) -> Result<()> + Send + Sync>;

/// The batch of one submission, with precomputed values for its operations.
pub(super) struct Run<'a> {
    pub(super) batch: &'a Batch,
}

impl Run<'_> {
    pub(super) fn rows(&self, rows: Rows) -> usize {
        match rows {
            Rows::Tokens => self.batch.tokens.len(),
            Rows::Outputs => self.batch.outputs.len(),
        }
    }

    /// Number of positions up to the end of the longest context.
    pub(super) fn reached(&self) -> usize {
        let segments = self.batch.segments.iter();
        let ends = segments.map(|segment| segment.position + segment.length);
        ends.max().unwrap_or_default()
    }

    /// Each segment with the range of its rows.
    pub(super) fn segments(&self) -> impl Iterator<Item = (&Segment, std::ops::Range<usize>)> {
        self.batch
            .segments
            .iter()
            .zip(self.batch.starts())
            .map(|(segment, start)| (segment, start..start + segment.length))
    }
}

pub(super) struct CpuStep {
    memory: Arc<Mutex<Memory>>,
    capacity: Capacity,
    demands: Demands,
    uses: Uses,
    names: Vec<&'static str>,
    operations: Vec<Operation>,
    timed: bool,
}

impl CpuStep {
    pub(super) fn new(
        memory: Arc<Mutex<Memory>>,
        capacity: Capacity,
        demands: Demands,
        uses: Uses,
    ) -> Self {
        Self {
            memory,
            capacity,
            demands,
            uses,
            names: Vec::new(),
            operations: Vec::new(),
            timed: false,
        }
    }

    fn defer(
        &mut self,
        name: &'static str,
        operation: impl Fn(&mut Memory, &Run<'_>, &mut StepOutput) -> Result<()> + Send + Sync + 'static,
    ) {
        self.names.push(name);
        self.operations.push(Box::new(operation));
    }

    /// Runs the operations one by one, timed if times are requested.
    fn run(&self, memory: &mut Memory, run: &Run<'_>, output: &mut StepOutput) -> Result<()> {
        if !self.timed {
            let mut operations = self.operations.iter();
            return operations.try_for_each(|operation| operation(memory, run, output));
        }
        for (name, operation) in self.names.iter().zip(&self.operations) {
            let start = std::time::Instant::now();
            operation(memory, run, output)?;
            output.add_time(name, start.elapsed().as_secs_f64() * 1e3);
        }
        Ok(())
    }

    /// Records an operation that writes all rows of `output`.
    pub(super) fn record_rows(
        &mut self,
        name: &'static str,
        output: Tensor,
        operation: impl Fn(&Memory, &Run<'_>, &mut [f32]) + Send + Sync + 'static,
    ) {
        self.defer(name, move |memory, run, _| {
            memory.with_output(output, run.rows(output.rows), |memory, values| {
                operation(memory, run, values)
            });
            Ok(())
        });
    }

    fn attention(&mut self, name: &'static str, op: MlaAttention, kernel: AttentionKernel) {
        let shape = Shape::new(&op.pool.layout, op.heads(), op.nope, op.value);
        self.record_rows(name, op.output, move |memory, run, output| {
            let query = memory.f32(op.query, run.rows(Rows::Tokens));
            for (segment, rows) in run
                .segments()
                .filter(|(segment, _)| op.segments.contains(segment.length))
            {
                let query = &query[rows.start * op.query.width..rows.end * op.query.width];
                let output = &mut output[rows.start * op.output.width..rows.end * op.output.width];
                kernel(
                    query,
                    memory.weight(op.kv_b),
                    &shape,
                    memory.latents.known(op.pool),
                    op.layer,
                    segment,
                    output,
                );
            }
        });
    }
}

impl CpuStep {
    /// Appends an operation, which was checked before. Blocks were expanded.
    pub(super) fn push(&mut self, op: &Op) {
        match *op {
            Op::Embed(op) => self.embed(op),
            Op::RmsNorm(op) => self.rms_norm(op),
            Op::Linear(op) => self.linear(op),
            Op::ShortConv(op) => self.short_conv(op),
            Op::KdaGates(op) => self.kda_gates(op),
            Op::KdaRecurrence(op) => self.kda_recurrence(op),
            Op::GatedNorm(op) => self.gated_norm(op),
            Op::MlaAppend(op) => self.mla_append(op),
            Op::MlaPrefill(op) => self.attention("mla_prefill", op, mla_prefill::mla_prefill),
            Op::MlaDecode(op) => self.attention("mla_decode", op, mla_decode::mla_decode),
            Op::Route(op) => self.route(op),
            Op::Experts(op) => self.experts(op),
            Op::ExpertRows(op) => self.expert_rows(op),
            Op::ExpertsCombine(op) => self.experts_combine(op),
            Op::Swiglu(op) => self.swiglu(op),
            Op::Add(op) => self.add(op),
            Op::AllGather(op) => self.all_gather(op),
            Op::Select(op) => self.select(op),
            Op::Sample(op) => self.sample(op),
            Op::Probe(tensor) => self.probe(tensor),
            Op::ProbePositions(tensor) => self.probe_positions(tensor),
            Op::TraceKda(op) => self.trace_kda(op),
            Op::TraceGate(op) => self.trace_gate(op),
            Op::TraceRoute(op) => self.trace_route(op),
            Op::TraceState(op) => self.trace_state(op),
            Op::TraceAttention(op) => self.trace_attention(op),
            // The sum over a single rank.
            Op::AllReduce(_) => {}
            Op::AddNorm(_)
            | Op::KdaBlock(_)
            | Op::MlaBlock(_)
            | Op::MlpBlock(_)
            | Op::MoeBlock(_) => {}
        }
    }

    fn embed(&mut self, op: Embed) {
        self.record_rows("embed", op.output, move |memory, run, output| {
            let drawn = op
                .drawn
                .map_or(&[][..], |drawn| memory.index(drawn, drawn.capacity));
            let tokens = embed::tokens(run.batch, drawn, op.weight.rows);
            embed::embed(&tokens, memory.weight(op.weight), output);
        });
    }

    fn rms_norm(&mut self, op: RmsNorm) {
        self.record_rows("rms_norm", op.output, move |memory, run, output| {
            let input = memory.f32(op.input, run.rows(op.input.rows));
            let weight = memory.weight(op.weight).to_vec();
            if op.input.rows == op.output.rows {
                let rows = (0..run.rows(op.input.rows)).into_par_iter();
                rms_norm::rms_norm(input, rows, &weight, op.eps, output);
            } else {
                let rows = run.batch.outputs.par_iter().map(|output| output.row);
                rms_norm::rms_norm(input, rows, &weight, op.eps, output);
            }
        });
    }

    fn linear(&mut self, op: Linear) {
        self.record_rows("linear", op.output, move |memory, run, output| {
            let input = memory.f32(op.input, run.rows(op.input.rows));
            linear::linear(input, memory.weight(op.weight), 0, op.weight.rows, output);
        });
    }

    fn short_conv(&mut self, op: ShortConv) {
        self.defer("short_conv", move |memory, run, _| {
            let input = memory.f32(op.input, run.rows(Rows::Tokens)).to_vec();
            let weight = memory.weight(op.weight).to_vec();
            let mut states = std::mem::take(&mut memory.states);
            memory.with_output(op.output, run.rows(Rows::Tokens), |_, output| {
                for (segment, rows) in run.segments() {
                    let range = rows.start * op.input.width..rows.end * op.input.width;
                    let (input, output) = (&input[range.clone()], &mut output[range]);
                    short_conv::short_conv(
                        input,
                        &weight,
                        states.known_mut(op.pool),
                        &op.pool.layout,
                        op.layer,
                        segment,
                        output,
                    );
                }
            });
            memory.states = states;
            Ok(())
        });
    }

    fn kda_gates(&mut self, op: KdaGates) {
        self.defer("kda_gates", move |memory, run, _| {
            let rows = run.rows(Rows::Tokens);
            memory.with_output(op.gates, rows, |memory, gates| {
                let (a_log, dt_bias) = (
                    memory.weight(op.a_log).to_vec(),
                    memory.weight(op.dt_bias).to_vec(),
                );
                kda_gates::log_decay(memory.f32(op.decay, rows), &a_log, &dt_bias, gates);
            });
            memory.with_output(op.beta, rows, |memory, beta| {
                kda_gates::write_strength(memory.f32(op.write, rows), beta);
            });
            Ok(())
        });
    }

    fn kda_recurrence(&mut self, op: KdaRecurrence) {
        self.defer("kda_recurrence", move |memory, run, _| {
            let count = run.rows(Rows::Tokens);
            let mut states = std::mem::take(&mut memory.states);
            memory.with_output(op.output, count, |memory, output| {
                let all = [op.qkv, op.gates, op.beta]
                    .map(|tensor| (memory.f32(tensor, count), tensor.width));
                for (segment, range) in run.segments() {
                    let [qkv, gates, beta] =
                        all.map(|(rows, width)| &rows[range.start * width..range.end * width]);
                    kda_recurrence::kda_recurrence(
                        &RecurrenceRows { qkv, gates, beta },
                        op.form,
                        states.known_mut(op.pool),
                        &op.pool.layout,
                        op.layer,
                        segment,
                        &mut output[range.start * op.output.width..range.end * op.output.width],
                    );
                }
            });
            memory.states = states;
            Ok(())
        });
    }

    fn gated_norm(&mut self, op: GatedNorm) {
        self.record_rows("gated_norm", op.output, move |memory, run, output| {
            let rows = run.rows(Rows::Tokens);
            let weight = memory.weight(op.weight).to_vec();
            gated_norm::gated_norm(
                memory.f32(op.input, rows),
                memory.f32(op.gate, rows),
                &weight,
                op.eps,
                output,
            );
        });
    }

    fn mla_append(&mut self, op: MlaAppend) {
        self.defer("mla_append", move |memory, run, _| {
            let mut latents = std::mem::take(&mut memory.latents);
            let weight = memory.weight(op.weight).to_vec();
            let input = memory.f32(op.input, run.rows(Rows::Tokens));
            for (segment, rows) in run.segments() {
                let input = &input[rows.start * op.input.width..rows.end * op.input.width];
                mla_append::mla_append(
                    input,
                    &weight,
                    op.eps,
                    latents.known_mut(op.pool),
                    op.layer,
                    segment,
                );
            }
            memory.latents = latents;
            Ok(())
        });
    }

    fn route(&mut self, op: Route) {
        self.defer("route", move |memory, run, _| {
            let rows = run.rows(Rows::Tokens);
            let mut ids = vec![0; rows * op.experts.width];
            memory.with_output(op.weights, rows, |memory, weights| {
                let bias = memory.weight(op.bias).to_vec();
                route::route(
                    memory.f32(op.input, rows),
                    memory.weight(op.weight),
                    &bias,
                    &op,
                    &mut ids,
                    weights,
                );
            });
            memory.index_mut(op.experts, rows).copy_from_slice(&ids);
            Ok(())
        });
    }

    fn experts(&mut self, op: Experts) {
        self.record_rows("experts", op.output, move |memory, run, output| {
            let rows = run.rows(Rows::Tokens);
            let stacks = Stacks::new(memory, [op.gate, op.up, op.down], op.first_expert);
            let (ids, weights) = (memory.index(op.experts, rows), memory.f32(op.weights, rows));
            experts::experts(memory.f32(op.input, rows), ids, weights, &stacks, output);
        });
    }

    fn expert_rows(&mut self, op: ExpertRows) {
        self.record_rows("expert_rows", op.output, move |memory, run, output| {
            let rows = run.rows(Rows::Tokens);
            let stacks = Stacks::new(memory, [op.gate, op.up, op.down], op.first_expert);
            let ids = memory.index(op.experts, rows);
            experts::expert_rows(memory.f32(op.input, rows), ids, &stacks, output);
        });
    }

    fn experts_combine(&mut self, op: ExpertsCombine) {
        self.record_rows("experts_combine", op.output, move |memory, run, output| {
            let rows = run.rows(Rows::Tokens);
            let weights = memory.f32(op.weights, rows);
            let results = memory.f32(op.rows, rows).chunks_exact(op.output.width);
            let results: Vec<Option<&[f32]>> = results.map(Some).collect();
            experts::combine(&results, weights, op.output.width, output);
        });
    }

    fn swiglu(&mut self, op: Swiglu) {
        self.record_rows("swiglu", op.output, move |memory, run, output| {
            swiglu::swiglu(
                memory.f32(op.input, run.rows(op.input.rows)),
                op.output.width,
                output,
            );
        });
    }

    fn add(&mut self, op: Add) {
        self.record_rows("add", op.target, move |memory, run, target| {
            let source = memory.f32(op.source, run.rows(op.source.rows));
            target
                .par_iter_mut()
                .zip(source)
                .with_min_len(4096)
                .for_each(|(target, source)| *target += source);
        });
    }

    fn all_gather(&mut self, op: AllGather) {
        self.record_rows("all_gather", op.output, move |memory, run, output| {
            output.copy_from_slice(memory.f32(op.input, run.rows(op.input.rows)));
        });
    }

    fn select(&mut self, op: Select) {
        self.defer("select", move |memory, run, result| {
            let logits = memory.f32(op.logits, run.rows(Rows::Outputs));
            result.choices =
                select::select(logits, op.logits.width, op.candidates, &run.batch.outputs);
            if op.keep_rows {
                result.logits = logits.to_vec();
            }
            Ok(())
        });
    }

    fn sample(&mut self, op: Sample) {
        self.defer("sample", move |memory, run, result| {
            let logits = memory.f32(op.logits, run.rows(Rows::Outputs));
            result.draws = sample::sample(logits, op.logits.width, &run.batch.draws);
            if let Some(drawn) = op.drawn {
                let rows = memory.index_mut(drawn, drawn.capacity).chunks_exact_mut(2);
                rows.zip(&result.draws)
                    .for_each(|(row, draw)| sample::keep(*draw, row));
            }
            Ok(())
        });
    }

    fn probe(&mut self, tensor: Tensor) {
        self.defer("probe", move |memory, run, result| {
            result
                .probes
                .push(memory.read(tensor, run.rows(tensor.rows))?);
            Ok(())
        });
    }

    fn probe_positions(&mut self, tensor: Tensor) {
        self.defer("probe", move |memory, run, result| {
            let values = memory.f32(tensor, run.rows(tensor.rows));
            let reached = run.reached().min(values.len());
            result
                .probes
                .push(TensorValues::F32(values[..reached].to_vec()));
            Ok(())
        });
    }
}

impl Step for CpuStep {
    fn time(&mut self, on: bool) -> Result<()> {
        if on && cfg!(target_arch = "wasm32") {
            return Err(BackendError::Unsupported {
                backend: "cpu",
                what: "timing in a browser: the library has no clock there".to_owned(),
            });
        }
        self.timed = on;
        Ok(())
    }

    fn operations(&self) -> &[&'static str] {
        &self.names
    }

    fn submit(&mut self, batch: &Batch) -> Result<Ticket<StepOutput>> {
        self.demands.check(&self.capacity, batch)?;
        let run = Run { batch };
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        memory.check_uses(&self.uses)?;
        let mut output = StepOutput::default();
        let memory = &mut *memory;
        // On a thread of the pool: from outside of it, each operation would wake a thread and wait for it.
        let result = rayon::scope(|_| self.run(memory, &run, &mut output));
        Ok(Ticket::ready(result.map(|()| output)))
    }
}

impl Drop for CpuStep {
    fn drop(&mut self) {
        self.uses = Uses::default();
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        memory.sweep();
    }
}
