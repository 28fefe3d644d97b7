//! The operations of a trace, which only traced programs contain. They are computed in `trace`.

use super::kda_recurrence::Rows as RecurrenceRows;
use super::memory::Memory;
use super::mla::Shape;
use super::step::CpuStep;
use super::trace;
use crate::backend::trace::{TraceAttention, TraceGate, TraceKda, TraceRoute, TraceState};
use crate::backend::{Rows, Segment, Tensor};

/// A single token that is traced.
struct TracedRow<'a> {
    memory: &'a Memory,
    /// Its index among the batch's rows.
    number: usize,
    segment: &'a Segment,
}

impl<'a> TracedRow<'a> {
    /// Its row of a tensor.
    fn of(&self, tensor: Tensor) -> &'a [f32] {
        let rows = self.memory.f32(tensor, self.number + 1);
        &rows[self.number * tensor.width..]
    }
}

impl CpuStep {
    /// Records an operation of a trace that writes one layer's part of each row of `output`: the result of `operation` for a
    /// single token, 0 for tokens of longer segments.
    fn record_layer(
        &mut self,
        name: &'static str,
        output: Tensor,
        layer: usize,
        layers: usize,
        operation: impl Fn(&TracedRow<'_>, &mut [f32]) + Send + Sync + 'static,
    ) {
        let width = output.width / layers;
        self.record_rows(name, output, move |memory, run, output| {
            let rows = output.chunks_exact_mut(layers * width);
            let parts = rows.map(|row| &mut row[layer * width..(layer + 1) * width]);
            let segments = run
                .segments()
                .flat_map(|(segment, range)| range.map(move |_| segment));
            for (number, (part, segment)) in parts.zip(segments).enumerate() {
                part.fill(0.0);
                if segment.length == 1 {
                    let row = TracedRow {
                        memory,
                        number,
                        segment,
                    };
                    operation(&row, part);
                }
            }
        });
    }

    pub(super) fn trace_kda(&mut self, op: TraceKda) {
        let layers = op.pool.layout.layers;
        self.record_layer(
            "trace_kda",
            op.output,
            op.layer,
            layers,
            move |row, output| {
                let [qkv, gates, beta] = [op.qkv, op.gates, op.beta].map(|tensor| row.of(tensor));
                trace::trace_kda(
                    &RecurrenceRows { qkv, gates, beta },
                    row.memory.states.known(op.pool),
                    &op.pool.layout,
                    op.layer,
                    row.segment,
                    output,
                );
            },
        );
    }

    pub(super) fn trace_gate(&mut self, op: TraceGate) {
        let layers = op.layout.layers;
        self.record_layer(
            "trace_gate",
            op.output,
            op.layer,
            layers,
            move |row, output| {
                trace::trace_gate(row.of(op.gate), output);
            },
        );
    }

    pub(super) fn trace_route(&mut self, op: TraceRoute) {
        self.record_layer(
            "trace_route",
            op.output,
            op.layer,
            op.layers,
            move |row, output| {
                let top = op.experts.width;
                let experts = &row.memory.index(op.experts, row.number + 1)[row.number * top..];
                trace::trace_route(experts, row.of(op.weights), output);
            },
        );
    }

    pub(super) fn trace_state(&mut self, op: TraceState) {
        self.record_rows("trace_state", op.output, move |memory, run, output| {
            output.fill(0.0);
            let size = op.output.width;
            let states = memory.states.known(op.pool);
            for (segment, range) in run.segments().filter(|(segment, _)| segment.length == 1) {
                let state = states.state(op.layer, segment.slot_out);
                let head = &state[op.head * size..(op.head + 1) * size];
                output[range.start * size..range.end * size].copy_from_slice(head);
            }
        });
    }

    pub(super) fn trace_attention(&mut self, op: TraceAttention) {
        let heads = op.query.width / (op.nope + op.pool.layout.rope);
        let shape = Shape::new(&op.pool.layout, heads, op.nope, op.value);
        self.record_rows("trace_attention", op.output, move |memory, run, output| {
            let positions = op.output.width;
            let reached = run.reached().min(positions);
            for row in output.chunks_exact_mut(positions) {
                row[..reached].fill(0.0);
            }
            let query = memory.f32(op.query, run.rows(Rows::Tokens));
            for (segment, range) in run.segments().filter(|(segment, _)| segment.length == 1) {
                let query = &query[range.start * op.query.width + op.head * shape.key()..];
                trace::trace_attention(
                    &query[..shape.key()],
                    memory.weight(op.kv_b),
                    &shape,
                    op.head,
                    memory.latents.known(op.pool),
                    op.layer,
                    segment,
                    &mut output[range.start * op.output.width..range.end * op.output.width],
                );
            }
        });
    }
}
