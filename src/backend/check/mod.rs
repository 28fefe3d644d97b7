//! What is checked of every program before a backend compiles it: the shapes of arguments.
//!
//! Batches are checked in `batch`, records in `record`. Written once, so that all backends refuse the same things in the
//! same words.

mod batch;
mod record;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
mod source;

pub(crate) use batch::Demands;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub(crate) use source::source;

use std::fmt::Display;

use super::trace::{TraceAttention, TraceGate, TraceKda, TraceRoute, TraceState, kda_record};
use super::{
    Add, AllGather, Capacity, Element, Embed, Experts, GatedNorm, KdaGates, KdaRecurrence, Linear,
    MlaAppend, MlaAttention, Op, Program, Result, RmsNorm, Route, Rows, Select, Shard, ShortConv,
    Swiglu, Tensor, Weight,
};
use crate::error::BackendError;

/// Checks every operation of a program for steps of this capacity, and gathers what they ask of batches.
pub(crate) fn program(program: &Program, capacity: &Capacity, shard: Shard) -> Result<Demands> {
    let mut demands = Demands::default();
    for op in &program.expanded(|_| false).ops {
        check(op, capacity, shard)?;
        match op {
            Op::Embed(op) => demands.vocabulary = Some(op.weight.rows),
            Op::ShortConv(op) => demands.states = Some(op.pool.layout),
            Op::KdaRecurrence(op) => demands.states = Some(op.pool.layout),
            Op::TraceKda(op) => demands.states = Some(op.pool.layout),
            Op::TraceState(op) => demands.states = Some(op.pool.layout),
            Op::MlaAppend(op) => demands.latents = Some(op.pool.layout),
            Op::MlaPrefill(op) | Op::MlaDecode(op) => demands.latents = Some(op.pool.layout),
            Op::TraceAttention(op) => demands.latents = Some(op.pool.layout),
            _ => {}
        }
    }
    Ok(demands)
}

/// Checks one operation that is no block.
fn check(op: &Op, capacity: &Capacity, shard: Shard) -> Result<()> {
    match op {
        Op::Embed(op) => op.check(capacity),
        Op::RmsNorm(op) => op.check(capacity),
        Op::Linear(op) => op.check(capacity),
        Op::ShortConv(op) => op.check(capacity),
        Op::KdaGates(op) => op.check(capacity),
        Op::KdaRecurrence(op) => op.check(capacity),
        Op::GatedNorm(op) => op.check(capacity),
        Op::MlaAppend(op) => op.check(capacity),
        Op::MlaPrefill(op) | Op::MlaDecode(op) => op.check(capacity),
        Op::Route(op) => op.check(capacity),
        Op::Experts(op) => op.check(capacity),
        Op::Swiglu(op) => op.check(capacity),
        Op::Add(op) => op.check(capacity),
        Op::AllGather(op) => op.check(capacity, shard.ranks),
        Op::Select(op) => op.check(capacity),
        Op::TraceKda(op) => op.check(capacity),
        Op::TraceGate(op) => op.check(capacity),
        Op::TraceRoute(op) => op.check(capacity),
        Op::TraceState(op) => op.check(capacity),
        Op::TraceAttention(op) => op.check(capacity),
        // Any tensor may be summed or probed; blocks were expanded.
        Op::AllReduce(_)
        | Op::Probe(_)
        | Op::ProbePositions(_)
        | Op::KdaBlock(_)
        | Op::MlaBlock(_)
        | Op::MlpBlock(_)
        | Op::MoeBlock(_) => Ok(()),
    }
}

/// Fails unless `found == expected`.
fn same<T: PartialEq + Display>(
    operation: &'static str,
    what: &'static str,
    expected: T,
    found: T,
) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(BackendError::Shape {
        operation,
        what,
        expected: expected.to_string(),
        found: found.to_string(),
    })
}

/// Fails unless a tensor has this width and element type.
fn tensor(
    operation: &'static str,
    what: &'static str,
    tensor: Tensor,
    width: usize,
    element: Element,
) -> Result<()> {
    let name = |width, element: Element| format!("{width} wide, {element:?}");
    same(
        operation,
        what,
        name(width, element),
        name(tensor.width, tensor.element),
    )
}

/// Fails unless a weight is a stack of this many matrices of this shape.
fn weight(
    operation: &'static str,
    what: &'static str,
    weight: Weight,
    shape: [usize; 3],
) -> Result<()> {
    let name = |shape: [usize; 3]| format!("{} x [{}, {}]", shape[0], shape[1], shape[2]);
    same(
        operation,
        what,
        name(shape),
        name([weight.stack, weight.rows, weight.columns]),
    )
}

/// Fails unless two tensors have a row for the same things.
fn rows(operation: &'static str, what: &'static str, expected: Rows, found: Tensor) -> Result<()> {
    same(
        operation,
        what,
        format!("{expected:?} rows"),
        format!("{:?} rows", found.rows),
    )
}

/// What must hold of every operation's tensors: those with a row a token have one, all of them hold as many rows as a
/// step may have, and what is written is not read or written in another place of the same operation.
fn operands(
    operation: &'static str,
    capacity: &Capacity,
    token_rows: bool,
    read: &[Tensor],
    written: &[Tensor],
) -> Result<()> {
    for tensor in read.iter().chain(written) {
        if token_rows {
            rows(operation, "a tensor", Rows::Tokens, *tensor)?;
        }
        let (what, needed) = match tensor.rows {
            Rows::Tokens => ("a tensor's capacity for tokens", capacity.tokens),
            Rows::Outputs => ("a tensor's capacity for output rows", capacity.outputs),
        };
        if tensor.capacity < needed {
            let (expected, found) = (format!("{needed} or more"), tensor.capacity.to_string());
            return Err(BackendError::Shape {
                operation,
                what,
                expected,
                found,
            });
        }
    }
    for (i, tensor) in written.iter().enumerate() {
        if read
            .iter()
            .chain(&written[..i])
            .any(|other| other.id == tensor.id)
        {
            let (expected, found) = (
                "no other of its tensors".to_owned(),
                "one of them".to_owned(),
            );
            return Err(BackendError::Shape {
                operation,
                what: "what it writes",
                expected,
                found,
            });
        }
    }
    Ok(())
}

/// Fails unless a layer is one of the pool's.
fn layer(operation: &'static str, layer: usize, layers: usize) -> Result<()> {
    if layer < layers {
        return Ok(());
    }
    let expected = format!("below {layers}");
    Err(BackendError::Shape {
        operation,
        what: "the layer",
        expected,
        found: layer.to_string(),
    })
}

use Element::{Activation, F32, Index};

impl Embed {
    fn check(&self, capacity: &Capacity) -> Result<()> {
        operands("embed", capacity, true, &[], &[self.output])?;
        rows("embed", "the output", Rows::Tokens, self.output)?;
        weight(
            "embed",
            "the weight",
            self.weight,
            [1, self.weight.rows, self.output.width],
        )
    }
}

impl RmsNorm {
    fn check(&self, capacity: &Capacity) -> Result<()> {
        let op = "rms_norm";
        operands(op, capacity, false, &[self.input], &[self.output])?;
        weight(op, "the weight", self.weight, [1, self.input.width, 1])?;
        tensor(op, "the output", self.output, self.input.width, Activation)?;
        if self.output.rows == Rows::Tokens {
            rows(op, "the input", Rows::Tokens, self.input)
        } else {
            Ok(())
        }
    }
}

impl Linear {
    fn check(&self, capacity: &Capacity) -> Result<()> {
        operands("linear", capacity, false, &[self.input], &[self.output])?;
        weight(
            "linear",
            "the weight",
            self.weight,
            [1, self.output.width, self.input.width],
        )?;
        rows("linear", "the output", self.input.rows, self.output)
    }
}

impl ShortConv {
    fn check(&self, capacity: &Capacity) -> Result<()> {
        let (op, layout) = ("short_conv", self.pool.layout);
        operands(op, capacity, true, &[self.input], &[self.output])?;
        layer(op, self.layer, layout.layers)?;
        tensor(op, "the input", self.input, layout.channels(), Activation)?;
        tensor(op, "the output", self.output, layout.channels(), Activation)?;
        weight(
            op,
            "the weight",
            self.weight,
            [1, layout.channels(), layout.taps],
        )
    }
}

impl KdaGates {
    fn check(&self, capacity: &Capacity) -> Result<()> {
        let (op, heads, channels) = ("kda_gates", self.write.width, self.decay.width);
        operands(
            op,
            capacity,
            true,
            &[self.decay, self.write],
            &[self.gates, self.beta],
        )?;
        weight(op, "A_log", self.a_log, [1, heads, 1])?;
        weight(op, "dt_bias", self.dt_bias, [1, channels, 1])?;
        tensor(op, "the gates", self.gates, channels, F32)?;
        tensor(op, "beta", self.beta, heads, F32)?;
        same(
            op,
            "the width of the decay modulo heads",
            0,
            channels % heads.max(1),
        )
    }
}

impl KdaRecurrence {
    fn check(&self, capacity: &Capacity) -> Result<()> {
        let (op, layout) = ("kda_recurrence", self.pool.layout);
        operands(
            op,
            capacity,
            true,
            &[self.qkv, self.gates, self.beta],
            &[self.output],
        )?;
        layer(op, self.layer, layout.layers)?;
        same(
            op,
            "value heads modulo key heads",
            0,
            layout.value_heads % layout.key_heads.max(1),
        )?;
        tensor(op, "qkv", self.qkv, layout.channels(), Activation)?;
        tensor(
            op,
            "the gates",
            self.gates,
            layout.value_heads * layout.key_width,
            F32,
        )?;
        tensor(op, "beta", self.beta, layout.value_heads, F32)?;
        tensor(
            op,
            "the output",
            self.output,
            layout.value_heads * layout.value_width,
            Activation,
        )
    }
}

impl TraceKda {
    fn check(&self, capacity: &Capacity) -> Result<()> {
        let (op, layout) = ("trace_kda", self.pool.layout);
        operands(
            op,
            capacity,
            true,
            &[self.qkv, self.gates, self.beta],
            &[self.output],
        )?;
        layer(op, self.layer, layout.layers)?;
        tensor(op, "qkv", self.qkv, layout.channels(), Activation)?;
        let channels = layout.value_heads * layout.key_width;
        tensor(op, "the gates", self.gates, channels, F32)?;
        tensor(op, "beta", self.beta, layout.value_heads, F32)?;
        let records = layout.layers * layout.value_heads * kda_record(&layout);
        tensor(op, "the output", self.output, records, F32)
    }
}

impl TraceGate {
    fn check(&self, capacity: &Capacity) -> Result<()> {
        let (op, layout) = ("trace_gate", self.layout);
        operands(op, capacity, true, &[self.gate], &[self.output])?;
        layer(op, self.layer, layout.layers)?;
        let width = layout.value_heads * layout.value_width;
        tensor(op, "the gate", self.gate, width, Activation)?;
        let means = layout.layers * layout.value_heads;
        tensor(op, "the output", self.output, means, F32)
    }
}

impl TraceRoute {
    fn check(&self, capacity: &Capacity) -> Result<()> {
        let (op, top) = ("trace_route", self.experts.width);
        operands(
            op,
            capacity,
            true,
            &[self.experts, self.weights],
            &[self.output],
        )?;
        layer(op, self.layer, self.layers)?;
        tensor(op, "the experts", self.experts, top, Index)?;
        tensor(op, "the weights", self.weights, top, F32)?;
        tensor(op, "the output", self.output, self.layers * 2 * top, F32)
    }
}

impl TraceState {
    fn check(&self, capacity: &Capacity) -> Result<()> {
        let (op, layout) = ("trace_state", self.pool.layout);
        operands(op, capacity, true, &[], &[self.output])?;
        layer(op, self.layer, layout.layers)?;
        if self.head >= layout.value_heads {
            return Err(BackendError::Shape {
                operation: op,
                what: "the head",
                expected: format!("below {}", layout.value_heads),
                found: self.head.to_string(),
            });
        }
        let size = layout.key_width * layout.value_width;
        tensor(op, "the output", self.output, size, F32)
    }
}

impl TraceAttention {
    fn check(&self, capacity: &Capacity) -> Result<()> {
        let (op, layout) = ("trace_attention", self.pool.layout);
        operands(op, capacity, true, &[self.query], &[self.output])?;
        layer(op, self.layer, layout.layers)?;
        let heads = self.query.width / (self.nope + layout.rope).max(1);
        layer(op, self.head, heads)?;
        let rows = heads * (self.nope + self.value);
        weight(op, "kv_b", self.kv_b, [1, rows, layout.latent])?;
        tensor(op, "the output", self.output, self.output.width, F32)
    }
}

impl GatedNorm {
    fn check(&self, capacity: &Capacity) -> Result<()> {
        let (op, width) = ("gated_norm", self.input.width);
        operands(op, capacity, true, &[self.input, self.gate], &[self.output])?;
        tensor(op, "the gate", self.gate, width, Activation)?;
        tensor(op, "the output", self.output, width, Activation)?;
        weight(op, "the weight", self.weight, [1, self.weight.rows, 1])?;
        same(
            op,
            "the input's width modulo a head",
            0,
            width % self.weight.rows.max(1),
        )
    }
}

impl MlaAppend {
    fn check(&self, capacity: &Capacity) -> Result<()> {
        let (op, layout) = ("mla_append", self.pool.layout);
        operands(op, capacity, true, &[self.input], &[])?;
        layer(op, self.layer, layout.layers)?;
        tensor(op, "the input", self.input, layout.width(), Activation)?;
        weight(op, "the weight", self.weight, [1, layout.latent, 1])
    }
}

impl MlaAttention {
    pub(crate) fn heads(&self) -> usize {
        self.output.width / self.value.max(1)
    }

    fn check(&self, capacity: &Capacity) -> Result<()> {
        let (op, layout, heads) = ("mla attention", self.pool.layout, self.heads());
        operands(op, capacity, true, &[self.query], &[self.output])?;
        layer(op, self.layer, layout.layers)?;
        tensor(
            op,
            "the query",
            self.query,
            heads * (self.nope + layout.rope),
            Activation,
        )?;
        tensor(
            op,
            "the output",
            self.output,
            heads * self.value,
            Activation,
        )?;
        weight(
            op,
            "kv_b",
            self.kv_b,
            [1, heads * (self.nope + self.value), layout.latent],
        )
    }
}

impl Route {
    fn check(&self, capacity: &Capacity) -> Result<()> {
        let (op, experts, top_k) = ("route", self.weight.rows, self.experts.width);
        operands(
            op,
            capacity,
            true,
            &[self.input],
            &[self.experts, self.weights],
        )?;
        weight(
            op,
            "the weight",
            self.weight,
            [1, experts, self.input.width],
        )?;
        weight(op, "the bias", self.bias, [1, experts, 1])?;
        tensor(op, "the experts", self.experts, top_k, Index)?;
        tensor(op, "the weights", self.weights, top_k, F32)?;
        same(op, "experts modulo groups", 0, experts % self.groups.max(1))?;
        let selectable = experts / self.groups.max(1) * self.top_groups.min(self.groups);
        same(
            op,
            "choices beyond the experts of the best groups",
            0,
            top_k.saturating_sub(selectable),
        )
    }
}

impl Experts {
    fn check(&self, capacity: &Capacity) -> Result<()> {
        let (op, d, n, local) = ("experts", self.input.width, self.gate.rows, self.gate.stack);
        operands(
            op,
            capacity,
            true,
            &[self.input, self.experts, self.weights],
            &[self.output],
        )?;
        weight(op, "gate", self.gate, [local, n, d])?;
        weight(op, "up", self.up, [local, n, d])?;
        weight(op, "down", self.down, [local, d, n])?;
        tensor(op, "the experts", self.experts, self.experts.width, Index)?;
        tensor(op, "the weights", self.weights, self.experts.width, F32)?;
        tensor(op, "the output", self.output, d, Activation)
    }
}

impl Swiglu {
    fn check(&self, capacity: &Capacity) -> Result<()> {
        operands("swiglu", capacity, false, &[self.input], &[self.output])?;
        rows("swiglu", "the output", self.input.rows, self.output)?;
        tensor(
            "swiglu",
            "the input",
            self.input,
            self.input.width,
            Activation,
        )?;
        tensor(
            "swiglu",
            "the output",
            self.output,
            self.output.width,
            Activation,
        )?;
        same(
            "swiglu",
            "the input's width",
            2 * self.output.width,
            self.input.width,
        )
    }
}

impl Add {
    fn check(&self, capacity: &Capacity) -> Result<()> {
        operands("add", capacity, false, &[self.source], &[self.target])?;
        rows("add", "the target", self.source.rows, self.target)?;
        tensor(
            "add",
            "the target",
            self.target,
            self.source.width,
            self.source.element,
        )
    }
}

impl AllGather {
    fn check(&self, capacity: &Capacity, ranks: usize) -> Result<()> {
        operands("all_gather", capacity, false, &[self.input], &[self.output])?;
        rows("all_gather", "the output", self.input.rows, self.output)?;
        tensor(
            "all_gather",
            "the output",
            self.output,
            ranks * self.input.width,
            self.input.element,
        )
    }
}

impl Select {
    fn check(&self, capacity: &Capacity) -> Result<()> {
        operands("select", capacity, false, &[self.logits], &[])?;
        rows("select", "the logits", Rows::Outputs, self.logits)?;
        tensor("select", "the logits", self.logits, self.logits.width, F32)?;
        same(
            "select",
            "whether at least one candidate is wanted",
            true,
            self.candidates > 0,
        )
    }
}
