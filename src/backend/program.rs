//! A forward pass as data: the operations of a step, in the order in which they run.
//!
//! The model builds a [`Program`] from handles alone; a backend compiles it ([`Backend::compile`](super::Backend::compile)).
//! What differs between two submissions is in the [`Batch`](super::Batch). Tracing, probing and collectives are operations
//! in the list. A block of the paper ([`KdaBlock`] and others) is one operation that a backend takes as a fused kernel or
//! has expanded into its parts.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::trace::{TraceAttention, TraceGate, TraceKda, TraceRoute, TraceState};
use super::{
    Add, AllGather, AllReduce, Embed, Experts, GatedNorm, KdaBlock, KdaGates, KdaRecurrence,
    Linear, MlaAppend, MlaAttention, MlaBlock, MlpBlock, MoeBlock, RmsNorm, Route, Select,
    ShortConv, Swiglu, Tensor, Weight,
};

/// Declares [`Op`], the names of its variants, and how arguments become one.
macro_rules! ops {
    ($($(#[$doc:meta])* $variant:ident($arguments:ty) = $name:literal $(, $from:ident)?;)*) => {
        /// One operation and its arguments.
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum Op {
            $($(#[$doc])* $variant($arguments),)*
        }

        impl Op {
            /// Its name, as the conformance list, timings and printed programs have it.
            #[must_use]
            pub fn name(&self) -> &'static str {
                match self {
                    $(Self::$variant(_) => $name,)*
                }
            }
        }

        $($(impl From<$from> for Op {
            fn from(arguments: $from) -> Self {
                Self::$variant(arguments.into())
            }
        })?)*
    };
}

ops! {
    /// `output[t] = weight[token[t]]`: the token embedding.
    Embed(Embed) = "embed", Embed;
    /// `output = input / sqrt(mean(input^2) + eps) * weight`, a row at a time. Where the output has one row an
    /// [`OutputRow`](super::OutputRow) and the input one a token, only the rows wanted are read.
    RmsNorm(RmsNorm) = "rms_norm", RmsNorm;
    /// `output = input weight^T`; no bias anywhere in this model.
    Linear(Linear) = "linear", Linear;
    /// Causal depthwise convolution and SiLU; reads and writes the convolution tails of the pool.
    ShortConv(ShortConv) = "short_conv", ShortConv;
    /// Log decay and write strength: `g = -exp(A_log) softplus(decay + dt_bias)`, `beta = sigmoid(beta)`.
    KdaGates(KdaGates) = "kda_gates", KdaGates;
    /// The gated delta rule (`S <- diag(e^g) S; S <- S + k (beta (v - S^T k))^T; o = S^T q`).
    KdaRecurrence(KdaRecurrence) = "kda_recurrence", KdaRecurrence;
    /// `output = RMSNorm_head(input; weight, eps) * sigmoid(gate)`.
    GatedNorm(GatedNorm) = "gated_norm", GatedNorm;
    /// Normalises the latent part of each token's row and appends `[c' | k_pe]` to its sequence's blocks.
    MlaAppend(MlaAppend) = "mla_append", MlaAppend;
    /// Causal attention with keys and values expanded from the latents: for many queries of one sequence.
    MlaPrefill(MlaAttention) = "mla_prefill";
    /// The same attention in the absorbed form, over the latents themselves: for few queries.
    MlaDecode(MlaAttention) = "mla_decode";
    /// The router: which experts, and with what weights. Where a biased score is not finite, all weights of the row are
    /// NaN: a damaged expert that is never chosen must not go unseen.
    Route(Route) = "route", Route;
    /// The routed experts held here: `output[t] = sum_e w_e down_e(silu(gate_e x) * up_e x)`.
    Experts(Experts) = "experts", Experts;
    /// `output = silu(input[..n]) * input[n..]`.
    Swiglu(Swiglu) = "swiglu", Swiglu;
    /// `target += source`.
    Add(Add) = "add", Add;
    /// Sums a tensor over all ranks, in rank order; nothing at one rank.
    AllReduce(AllReduce) = "all_reduce", AllReduce;
    /// Lays the ranks' columns side by side, in rank order; a copy at one rank.
    AllGather(AllGather) = "all_gather", AllGather;
    /// The next token of each output row: its best candidates and log-normaliser.
    Select(Select) = "select", Select;
    /// Has every submission return this tensor's rows in [`StepOutput::probes`](super::StepOutput::probes), as they are at
    /// this place.
    Probe(Tensor) = "probe";
    /// Probes a tensor of one row that has a place for each position: no more need come back than the batch reaches. No
    /// operation after this one may write the tensor.
    ProbePositions(Tensor) = "probe";
    /// What a KDA layer is about to do to its states, in numbers; in front of the recurrence that it describes.
    TraceKda(TraceKda) = "trace_kda", TraceKda;
    /// How far each head's output gate is open.
    TraceGate(TraceGate) = "trace_gate", TraceGate;
    /// Which experts a layer chose.
    TraceRoute(TraceRoute) = "trace_route", TraceRoute;
    /// What a KDA layer has left in one head's state, to be probed.
    TraceState(TraceState) = "trace_state", TraceState;
    /// What one head attends to.
    TraceAttention(TraceAttention) = "trace_attention", TraceAttention;
    /// One KDA layer's attention half.
    KdaBlock(Box<KdaBlock>) = "kda_block", KdaBlock;
    /// One MLA layer's attention half.
    MlaBlock(Box<MlaBlock>) = "mla_block", MlaBlock;
    /// A gated MLP (dense layers and shared experts).
    MlpBlock(Box<MlpBlock>) = "mlp_block", MlpBlock;
    /// Router, routed and shared experts.
    MoeBlock(Box<MoeBlock>) = "moe_block", MoeBlock;
}

impl Op {
    /// The parts of a block, of which some may be blocks again; `None` for an operation that has none.
    #[must_use]
    pub fn parts(&self) -> Option<Vec<Op>> {
        match self {
            Self::KdaBlock(block) => Some(block.ops()),
            Self::MlaBlock(block) => Some(block.ops()),
            Self::MlpBlock(block) => Some(block.ops()),
            Self::MoeBlock(block) => Some(block.ops()),
            _ => None,
        }
    }
}

/// The operations of a step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Program {
    /// In the order in which they run.
    pub ops: Vec<Op>,
    /// Names of parts of the list and the operation that each begins with, in ascending order: `layer 3: KDA, MoE`.
    pub sections: Vec<(usize, String)>,
}

impl Program {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends an operation.
    pub fn push(&mut self, op: impl Into<Op>) {
        self.ops.push(op.into());
    }

    /// Names what is appended from here on.
    pub fn section(&mut self, name: impl Into<String>) {
        self.sections.push((self.ops.len(), name.into()));
    }

    /// The program with `rewrite` in place of each operation: none, one or several others. Sections stay with what they
    /// name.
    #[must_use]
    pub fn rewritten(&self, mut rewrite: impl FnMut(&Op) -> Vec<Op>) -> Self {
        let mut sections = self.sections.iter().peekable();
        let mut program = Self::new();
        for (at, op) in self.ops.iter().enumerate() {
            while let Some((_, name)) = sections.next_if(|(first, _)| *first <= at) {
                program.section(name.clone());
            }
            program.ops.extend(rewrite(op));
        }
        for (_, name) in sections {
            program.section(name.clone());
        }
        program
    }

    /// The program with every block expanded that a backend does not take whole.
    #[must_use]
    pub fn expanded(&self, takes: impl Fn(&Op) -> bool) -> Self {
        fn parts(op: &Op, takes: &dyn Fn(&Op) -> bool) -> Vec<Op> {
            match op.parts() {
                Some(inner) if !takes(op) => inner.iter().flat_map(|op| parts(op, takes)).collect(),
                _ => vec![op.clone()],
            }
        }
        self.rewritten(|op| parts(op, &takes))
    }
}

impl<T: Into<Op>> FromIterator<T> for Program {
    fn from_iter<I: IntoIterator<Item = T>>(ops: I) -> Self {
        Self {
            ops: ops.into_iter().map(Into::into).collect(),
            sections: Vec::new(),
        }
    }
}

/// What an operation reads and writes, for printing and for checks that are the same for all.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Operands {
    /// Tensors that it reads.
    pub reads: Vec<Tensor>,
    /// Weights that it reads.
    pub weights: Vec<Weight>,
    /// Tensors that it writes.
    pub writes: Vec<Tensor>,
    /// The layer of a pool that it reads and writes: which pool, and which layer.
    pub layer: Option<(&'static str, usize)>,
}

impl Op {
    /// What it reads and writes. A block's are those that come in and go out; its scratch tensors are left out.
    #[must_use]
    pub fn operands(&self) -> Operands {
        let of = |reads: &[Tensor], weights: &[Weight], writes: &[Tensor]| Operands {
            reads: reads.to_vec(),
            weights: weights.to_vec(),
            writes: writes.to_vec(),
            layer: None,
        };
        let in_layer = |pool, layer, operands: Operands| Operands {
            layer: Some((pool, layer)),
            ..operands
        };
        let (states, latents) = ("states", "latents");
        match self {
            Self::Embed(op) => of(&[], &[op.weight], &[op.output]),
            Self::RmsNorm(op) => of(&[op.input], &[op.weight], &[op.output]),
            Self::Linear(op) => of(&[op.input], &[op.weight], &[op.output]),
            Self::ShortConv(op) => {
                let operands = of(&[op.input], &[op.weight], &[op.output]);
                in_layer(states, op.layer, operands)
            }
            Self::KdaGates(op) => of(
                &[op.decay, op.write],
                &[op.a_log, op.dt_bias],
                &[op.gates, op.beta],
            ),
            Self::KdaRecurrence(op) => {
                let operands = of(&[op.qkv, op.gates, op.beta], &[], &[op.output]);
                in_layer(states, op.layer, operands)
            }
            Self::GatedNorm(op) => of(&[op.input, op.gate], &[op.weight], &[op.output]),
            Self::MlaAppend(op) => in_layer(latents, op.layer, of(&[op.input], &[op.weight], &[])),
            Self::MlaPrefill(op) | Self::MlaDecode(op) => {
                in_layer(latents, op.layer, of(&[op.query], &[op.kv_b], &[op.output]))
            }
            Self::Route(op) => of(
                &[op.input],
                &[op.weight, op.bias],
                &[op.experts, op.weights],
            ),
            Self::Experts(op) => of(
                &[op.input, op.experts, op.weights],
                &[op.gate, op.up, op.down],
                &[op.output],
            ),
            Self::Swiglu(op) => of(&[op.input], &[], &[op.output]),
            Self::Add(op) => of(&[op.source, op.target], &[], &[op.target]),
            Self::AllReduce(op) => of(&[op.target], &[], &[op.target]),
            Self::AllGather(op) => of(&[op.input], &[], &[op.output]),
            Self::Select(op) => of(&[op.logits], &[], &[]),
            Self::Probe(tensor) | Self::ProbePositions(tensor) => of(&[*tensor], &[], &[]),
            Self::TraceKda(op) => {
                let operands = of(&[op.qkv, op.gates, op.beta], &[], &[op.output]);
                in_layer(states, op.layer, operands)
            }
            Self::TraceGate(op) => in_layer(states, op.layer, of(&[op.gate], &[], &[op.output])),
            Self::TraceRoute(op) => of(&[op.experts, op.weights], &[], &[op.output]),
            Self::TraceState(op) => in_layer(states, op.layer, of(&[], &[], &[op.output])),
            Self::TraceAttention(op) => {
                in_layer(latents, op.layer, of(&[op.query], &[op.kv_b], &[op.output]))
            }
            Self::KdaBlock(block) => in_layer(
                states,
                block.layer,
                of(&[block.input], &[], &[block.output]),
            ),
            Self::MlaBlock(block) => in_layer(
                latents,
                block.layer,
                of(&[block.input], &[], &[block.output]),
            ),
            Self::MlpBlock(block) => of(&[block.input], &[], &[block.output]),
            Self::MoeBlock(block) => of(&[block.route.input], &[], &[block.output]),
        }
    }
}

/// One line: name, what is read, what is written. `t3[T,2304]` is a tensor with a row a token, `[O,..]` one with a row an
/// output, `w12[12288,2304]` a weight.
impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Operands {
            reads,
            weights,
            writes,
            layer,
        } = self.operands();
        let list = |parts: Vec<String>| parts.join(" ");
        write!(f, "{:<16}", self.name())?;
        let read = reads.iter().map(ToString::to_string);
        let read: Vec<String> = read
            .chain(weights.iter().map(ToString::to_string))
            .collect();
        write!(f, "{}", list(read))?;
        if let Some((pool, layer)) = layer {
            write!(f, " {pool}[{layer}]")?;
        }
        if writes.is_empty() {
            return Ok(());
        }
        write!(
            f,
            " -> {}",
            list(writes.iter().map(ToString::to_string).collect())
        )
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut sections = self.sections.iter().peekable();
        for (at, op) in self.ops.iter().enumerate() {
            while let Some((_, name)) = sections.next_if(|(first, _)| *first <= at) {
                writeln!(f, "# {name}")?;
            }
            writeln!(f, "{at:>5}  {op}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Element, Rows};

    fn tensor(id: u32, width: usize) -> Tensor {
        Tensor {
            id,
            rows: Rows::Tokens,
            capacity: 8,
            width,
            element: Element::Activation,
        }
    }

    fn program() -> Program {
        let mut program = Program::new();
        program.section("layer 0");
        program.push(Swiglu {
            input: tensor(1, 8),
            output: tensor(2, 4),
        });
        program.section("head");
        program.push(Add {
            source: tensor(2, 4),
            target: tensor(3, 4),
        });
        program.push(Op::Probe(tensor(3, 4)));
        program
    }

    #[test]
    fn a_program_prints_a_line_an_operation_under_its_sections() {
        assert_eq!(
            program().to_string(),
            "# layer 0\n    0  swiglu          t1[T,8] -> t2[T,4]\n# head\n\
             \x20   1  add             t2[T,4] t3[T,4] -> t3[T,4]\n    2  probe           t3[T,4]\n"
        );
    }

    #[test]
    fn a_program_survives_a_file() {
        let text = serde_json::to_string(&program()).unwrap();
        assert_eq!(serde_json::from_str::<Program>(&text).unwrap(), program());
    }

    #[test]
    fn sections_stay_with_what_they_name_when_operations_come_and_go() {
        let twice = program().rewritten(|op| vec![op.clone(), op.clone()]);
        assert_eq!(twice.sections[1], (2, "head".to_owned()));
        let none = program().rewritten(|_| Vec::new());
        assert_eq!(none.ops, []);
        assert_eq!(none.sections.len(), 2);
    }
}
