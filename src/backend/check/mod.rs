//! Checks the shapes of a program's operations before a backend compiles it.
//!
//! Batches are checked in `batch`, records in `record`. All backends share these checks, so that they refuse the same
//! arguments with the same messages.

mod batch;
mod record;

pub(crate) use batch::Demands;

use std::fmt::Display;

use super::trace::{TraceAttention, TraceGate, TraceKda, TraceRoute, TraceState, kda_row};
use super::{
    Add, AllGather, Capacity, Element, Embed, ExpertRows, Experts, ExpertsCombine, GatedNorm,
    KdaGates, KdaRecurrence, Linear, MlaAppend, MlaAttention, Op, Operands, Program, Result,
    RmsNorm, Route, Rows, Sample, Select, ShortConv, StateLayout, Swiglu, Tensor, Weight,
};
use crate::error::BackendError;

/// Checks every operation of a program for steps of this capacity on a device that exchanges results with `ranks` devices, itself
/// included, and collects what the operations require of batches.
pub(crate) fn program(program: &Program, capacity: &Capacity, ranks: usize) -> Result<Demands> {
    let mut demands = Demands::default();
    for op in &program.expanded(|_| false).ops {
        check(op, capacity, ranks)?;
        match op {
            Op::Embed(op) => {
                demands.vocabulary = Some(op.weight.rows);
                demands.drawn = op.drawn;
            }
            Op::ShortConv(op) => demands.states = Some(op.pool.layout),
            Op::KdaRecurrence(op) => demands.states = Some(op.pool.layout),
            Op::TraceKda(op) => demands.states = Some(op.pool.layout),
            Op::TraceState(op) => demands.states = Some(op.pool.layout),
            Op::MlaAppend(op) => demands.latents = Some(op.pool.layout),
            Op::MlaPrefill(op) | Op::MlaDecode(op) => demands.latents = Some(op.pool.layout),
            Op::TraceAttention(op) => demands.latents = Some(op.pool.layout),
            Op::Sample(op) => demands.sample = Some(*op),
            _ => {}
        }
    }
    Ok(demands)
}

/// Checks one operation that is not a block.
fn check(op: &Op, capacity: &Capacity, ranks: usize) -> Result<()> {
    let name = Operation(op.name());
    // Any tensor may be summed or probed; blocks were expanded.
    if !matches!(op, Op::AllReduce(_) | Op::Probe(_) | Op::ProbePositions(_)) {
        name.operands(op, capacity)?;
    }
    match op {
        Op::Embed(op) => op.check(name),
        Op::RmsNorm(op) => op.check(name),
        Op::Linear(op) => op.check(name),
        Op::ShortConv(op) => op.check(name),
        Op::KdaGates(op) => op.check(name),
        Op::KdaRecurrence(op) => op.check(name),
        Op::GatedNorm(op) => op.check(name),
        Op::MlaAppend(op) => op.check(name),
        Op::MlaPrefill(op) | Op::MlaDecode(op) => op.check(name),
        Op::Route(op) => op.check(name),
        Op::Experts(op) => op.check(name),
        Op::ExpertRows(op) => op.check(name),
        Op::ExpertsCombine(op) => op.check(name),
        Op::Swiglu(op) => op.check(name),
        Op::Add(op) => op.check(name),
        Op::AllGather(op) => op.check(name, ranks),
        Op::Select(op) => op.check(name),
        Op::Sample(op) => op.check(name),
        Op::TraceKda(op) => op.check(name),
        Op::TraceGate(op) => op.check(name),
        Op::TraceRoute(op) => op.check(name),
        Op::TraceState(op) => op.check(name),
        Op::TraceAttention(op) => op.check(name),
        Op::AllReduce(_) | Op::Probe(_) | Op::ProbePositions(_) => Ok(()),
        Op::AddNorm(_) | Op::KdaBlock(_) | Op::MlaBlock(_) | Op::MlpBlock(_) | Op::MoeBlock(_) => {
            Ok(())
        }
    }
}

/// An operation's name, with checks of its arguments that report it.
#[derive(Clone, Copy)]
struct Operation(&'static str);

impl Operation {
    fn wrong<T>(self, what: &'static str, expected: String, found: String) -> Result<T> {
        let operation = self.0;
        Err(BackendError::Shape {
            operation,
            what,
            expected,
            found,
        })
    }

    /// Fails unless `found == expected`.
    fn same<T: PartialEq + Display>(self, what: &'static str, expected: T, found: T) -> Result<()> {
        if expected == found {
            return Ok(());
        }
        self.wrong(what, expected.to_string(), found.to_string())
    }

    /// Fails unless a tensor has this width and element type.
    fn tensor(
        self,
        what: &'static str,
        tensor: Tensor,
        width: usize,
        element: Element,
    ) -> Result<()> {
        let name = |width, element: Element| format!("{width} wide, {element:?}");
        let (expected, found) = (name(width, element), name(tensor.width, tensor.element));
        self.same(what, expected, found)
    }

    /// Fails unless a weight is a stack of this many matrices of this shape.
    fn weight(self, what: &'static str, weight: Weight, shape: [usize; 3]) -> Result<()> {
        let name = |[stack, rows, columns]: [usize; 3]| format!("{stack} x [{rows}, {columns}]");
        let found = name([weight.stack, weight.rows, weight.columns]);
        self.same(what, name(shape), found)
    }

    /// Fails unless these are gate, up and down of the same experts, for rows of width `d`.
    fn stacks(self, [gate, up, down]: [Weight; 3], d: usize) -> Result<()> {
        let (n, local) = (gate.rows, gate.stack);
        self.weight("gate", gate, [local, n, d])?;
        self.weight("up", up, [local, n, d])?;
        self.weight("down", down, [local, d, n])
    }

    /// Fails unless a tensor's rows are of the expected kind (tokens or outputs).
    fn rows(self, what: &'static str, expected: Rows, found: Tensor) -> Result<()> {
        let name = |rows: Rows| format!("{rows:?} rows");
        self.same(what, name(expected), name(found.rows))
    }

    /// Fails unless these are drawn tokens and their logits.
    fn drawn(self, drawn: Option<Tensor>) -> Result<()> {
        let mut drawn = drawn.into_iter();
        drawn.try_for_each(|drawn| self.tensor("the drawn tokens", drawn, 2, Index))
    }

    /// Fails unless the pool has this layer.
    fn layer(self, layer: usize, layers: usize) -> Result<()> {
        if layer < layers {
            return Ok(());
        }
        self.wrong("the layer", format!("below {layers}"), layer.to_string())
    }

    /// Fails unless these are inputs of a recurrence over states of this layout.
    fn recurrence(
        self,
        layout: &StateLayout,
        qkv: Tensor,
        gates: Tensor,
        beta: Tensor,
    ) -> Result<()> {
        self.tensor("qkv", qkv, layout.channels(), Activation)?;
        let channels = layout.value_heads * layout.key_width;
        self.tensor("the gates", gates, channels, F32)?;
        self.tensor("beta", beta, layout.value_heads, F32)
    }

    /// Checks an operation's tensors: those that need a row per token have one, all have the capacity for the step's rows,
    /// and a tensor that is written is not also read or written as another operand.
    fn operands(self, op: &Op, capacity: &Capacity) -> Result<()> {
        use Op::{Add, AllGather, Linear, RmsNorm, Sample, Select, Swiglu};
        let Operands { reads, writes, .. } = op.operands();
        let any_rows = matches!(
            op,
            RmsNorm(_) | Linear(_) | Swiglu(_) | Add(_) | AllGather(_) | Select(_) | Sample(_)
        );
        for tensor in reads.iter().chain(&writes) {
            if !any_rows {
                self.rows("a tensor", Rows::Tokens, *tensor)?;
            }
            let (what, needed) = match tensor.rows {
                Rows::Tokens => ("a tensor's capacity for tokens", capacity.tokens),
                Rows::Outputs => ("a tensor's capacity for output rows", capacity.outputs),
            };
            if tensor.capacity < needed {
                return self.wrong(
                    what,
                    format!("{needed} or more"),
                    tensor.capacity.to_string(),
                );
            }
        }
        // A sum is written over one of its two operands.
        let in_place = usize::from(matches!(op, Add(_)));
        for (i, tensor) in writes.iter().enumerate() {
            let others = reads.iter().chain(&writes[..i]);
            if others.filter(|other| other.id == tensor.id).count() > in_place {
                let (expected, found) = ("a tensor that is no other operand", "another operand");
                return self.wrong(
                    "the tensor that it writes",
                    expected.to_owned(),
                    found.to_owned(),
                );
            }
        }
        Ok(())
    }
}

use Element::{Activation, F32, Index};

impl Embed {
    fn check(&self, op: Operation) -> Result<()> {
        op.rows("the output", Rows::Tokens, self.output)?;
        op.drawn(self.drawn)?;
        op.weight(
            "the weight",
            self.weight,
            [1, self.weight.rows, self.output.width],
        )
    }
}

impl RmsNorm {
    fn check(&self, op: Operation) -> Result<()> {
        op.weight("the weight", self.weight, [1, self.input.width, 1])?;
        op.tensor("the output", self.output, self.input.width, Activation)?;
        if self.output.rows == Rows::Tokens {
            op.rows("the input", Rows::Tokens, self.input)
        } else {
            Ok(())
        }
    }
}

impl Linear {
    fn check(&self, op: Operation) -> Result<()> {
        op.weight(
            "the weight",
            self.weight,
            [1, self.output.width, self.input.width],
        )?;
        op.rows("the output", self.input.rows, self.output)
    }
}

impl ShortConv {
    fn check(&self, op: Operation) -> Result<()> {
        let layout = self.pool.layout;
        op.layer(self.layer, layout.layers)?;
        op.tensor("the input", self.input, layout.channels(), Activation)?;
        op.tensor("the output", self.output, layout.channels(), Activation)?;
        op.weight(
            "the weight",
            self.weight,
            [1, layout.channels(), layout.taps],
        )
    }
}

impl KdaGates {
    fn check(&self, op: Operation) -> Result<()> {
        let (heads, channels) = (self.write.width, self.decay.width);
        op.weight("A_log", self.a_log, [1, heads, 1])?;
        op.weight("dt_bias", self.dt_bias, [1, channels, 1])?;
        op.tensor("the gates", self.gates, channels, F32)?;
        op.tensor("beta", self.beta, heads, F32)?;
        op.same(
            "the width of the decay modulo heads",
            0,
            channels % heads.max(1),
        )
    }
}

impl KdaRecurrence {
    fn check(&self, op: Operation) -> Result<()> {
        let layout = self.pool.layout;
        op.layer(self.layer, layout.layers)?;
        op.same(
            "value heads modulo key heads",
            0,
            layout.value_heads % layout.key_heads.max(1),
        )?;
        op.recurrence(&layout, self.qkv, self.gates, self.beta)?;
        let width = layout.value_heads * layout.value_width;
        op.tensor("the output", self.output, width, Activation)
    }
}

impl TraceKda {
    fn check(&self, op: Operation) -> Result<()> {
        let layout = self.pool.layout;
        op.layer(self.layer, layout.layers)?;
        op.recurrence(&layout, self.qkv, self.gates, self.beta)?;
        let records = layout.layers * layout.value_heads * kda_row(&layout);
        op.tensor("the output", self.output, records, F32)
    }
}

impl TraceGate {
    fn check(&self, op: Operation) -> Result<()> {
        let layout = self.layout;
        op.layer(self.layer, layout.layers)?;
        let width = layout.value_heads * layout.value_width;
        op.tensor("the gate", self.gate, width, Activation)?;
        let means = layout.layers * layout.value_heads;
        op.tensor("the output", self.output, means, F32)
    }
}

impl TraceRoute {
    fn check(&self, op: Operation) -> Result<()> {
        let top = self.experts.width;
        op.layer(self.layer, self.layers)?;
        op.tensor("the experts", self.experts, top, Index)?;
        op.tensor("the weights", self.weights, top, F32)?;
        op.tensor("the output", self.output, self.layers * 2 * top, F32)
    }
}

impl TraceState {
    fn check(&self, op: Operation) -> Result<()> {
        let layout = self.pool.layout;
        op.layer(self.layer, layout.layers)?;
        if self.head >= layout.value_heads {
            let expected = format!("below {}", layout.value_heads);
            return op.wrong("the head", expected, self.head.to_string());
        }
        let size = layout.key_width * layout.value_width;
        op.tensor("the output", self.output, size, F32)
    }
}

impl TraceAttention {
    fn check(&self, op: Operation) -> Result<()> {
        let layout = self.pool.layout;
        op.layer(self.layer, layout.layers)?;
        let heads = self.query.width / (self.nope + layout.rope).max(1);
        op.layer(self.head, heads)?;
        let rows = heads * (self.nope + self.value);
        op.weight("kv_b", self.kv_b, [1, rows, layout.latent])?;
        op.tensor("the output", self.output, self.output.width, F32)
    }
}

impl GatedNorm {
    fn check(&self, op: Operation) -> Result<()> {
        let width = self.input.width;
        op.tensor("the gate", self.gate, width, Activation)?;
        op.tensor("the output", self.output, width, Activation)?;
        op.weight("the weight", self.weight, [1, self.weight.rows, 1])?;
        op.same(
            "the input's width modulo a head",
            0,
            width % self.weight.rows.max(1),
        )
    }
}

impl MlaAppend {
    fn check(&self, op: Operation) -> Result<()> {
        let layout = self.pool.layout;
        op.layer(self.layer, layout.layers)?;
        op.tensor("the input", self.input, layout.width(), Activation)?;
        op.weight("the weight", self.weight, [1, layout.latent, 1])
    }
}

impl MlaAttention {
    pub(crate) fn heads(&self) -> usize {
        self.output.width / self.value.max(1)
    }

    fn check(&self, op: Operation) -> Result<()> {
        let (layout, heads) = (self.pool.layout, self.heads());
        op.layer(self.layer, layout.layers)?;
        op.tensor(
            "the query",
            self.query,
            heads * (self.nope + layout.rope),
            Activation,
        )?;
        op.tensor("the output", self.output, heads * self.value, Activation)?;
        op.weight(
            "kv_b",
            self.kv_b,
            [1, heads * (self.nope + self.value), layout.latent],
        )
    }
}

impl Route {
    fn check(&self, op: Operation) -> Result<()> {
        let (experts, top_k) = (self.weight.rows, self.experts.width);
        op.weight("the weight", self.weight, [1, experts, self.input.width])?;
        op.weight("the bias", self.bias, [1, experts, 1])?;
        op.tensor("the experts", self.experts, top_k, Index)?;
        op.tensor("the weights", self.weights, top_k, F32)?;
        op.same("experts modulo groups", 0, experts % self.groups.max(1))?;
        let selectable = experts / self.groups.max(1) * self.top_groups.min(self.groups);
        op.same(
            "choices beyond the experts of the best groups",
            0,
            top_k.saturating_sub(selectable),
        )
    }
}

impl Experts {
    fn check(&self, op: Operation) -> Result<()> {
        let d = self.input.width;
        op.stacks([self.gate, self.up, self.down], d)?;
        op.tensor("the experts", self.experts, self.experts.width, Index)?;
        op.tensor("the weights", self.weights, self.experts.width, F32)?;
        op.tensor("the output", self.output, d, Activation)
    }
}

impl ExpertRows {
    fn check(&self, op: Operation) -> Result<()> {
        let d = self.input.width;
        op.stacks([self.gate, self.up, self.down], d)?;
        op.tensor("the experts", self.experts, self.experts.width, Index)?;
        op.tensor("the output", self.output, self.experts.width * d, F32)
    }
}

impl ExpertsCombine {
    fn check(&self, op: Operation) -> Result<()> {
        let (d, top_k) = (self.output.width, self.experts.width);
        op.tensor("the experts", self.experts, top_k, Index)?;
        op.tensor("the weights", self.weights, top_k, F32)?;
        op.tensor("the rows", self.rows, top_k * d, F32)?;
        op.tensor("the output", self.output, d, Activation)
    }
}

impl Swiglu {
    fn check(&self, op: Operation) -> Result<()> {
        op.rows("the output", self.input.rows, self.output)?;
        op.tensor("the input", self.input, self.input.width, Activation)?;
        op.tensor("the output", self.output, self.output.width, Activation)?;
        op.same("the input's width", 2 * self.output.width, self.input.width)
    }
}

impl Add {
    fn check(&self, op: Operation) -> Result<()> {
        op.rows("the target", self.source.rows, self.target)?;
        op.tensor(
            "the target",
            self.target,
            self.source.width,
            self.source.element,
        )
    }
}

impl AllGather {
    fn check(&self, op: Operation, ranks: usize) -> Result<()> {
        op.rows("the output", self.input.rows, self.output)?;
        // What is not divided among the ranks is copied.
        let width = match self.output.width == self.input.width {
            true => self.input.width,
            false => ranks * self.input.width,
        };
        op.tensor("the output", self.output, width, self.input.element)
    }
}

impl Select {
    fn check(&self, op: Operation) -> Result<()> {
        op.rows("the logits", Rows::Outputs, self.logits)?;
        op.tensor("the logits", self.logits, self.logits.width, F32)?;
        op.same(
            "whether at least one candidate is requested",
            true,
            self.candidates > 0,
        )
    }
}

impl Sample {
    fn check(&self, op: Operation) -> Result<()> {
        op.rows("the logits", Rows::Outputs, self.logits)?;
        op.tensor("the logits", self.logits, self.logits.width, F32)
    }
}
