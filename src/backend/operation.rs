//! Every operation: its name, its arguments, what it reads and writes. Shapes are checked in `check`.
//!
//! In shapes, T is the number of tokens, O of output rows, H of heads, K and V are the widths of a key and a value, d is the
//! model's width.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::trace::{TraceAttention, TraceGate, TraceKda, TraceRoute, TraceState};
use super::{
    AddNorm, DrawCapacity, KdaBlock, LatentPool, MlaBlock, MlpBlock, MoeBlock, StatePool, Tensor,
    Weight,
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
            /// The name of some operation, if it is one.
            #[must_use]
            pub fn known_name(name: &str) -> Option<&'static str> {
                [$($name),*].into_iter().find(|known| *known == name)
            }

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
    /// `output[t] = weight[token[t]]`: the token embedding. Tokens in [`Batch::fed`](super::Batch::fed) are drawn ones.
    Embed(Embed) = "embed", Embed;
    /// `output = input / sqrt(mean(input^2) + eps) * weight`, row by row. If the output has one row per
    /// [`OutputRow`](super::OutputRow) and the input one per token, only the requested rows are read.
    RmsNorm(RmsNorm) = "rms_norm", RmsNorm;
    /// `output = input weight^T`; no bias anywhere in this model.
    Linear(Linear) = "linear", Linear;
    /// Causal depthwise convolution and SiLU; reads and writes the convolution states of the pool.
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
    /// The router: the chosen experts and their weights. If a biased score is not finite, all weights of the row are NaN, so
    /// that a damaged expert which is never chosen does not go unnoticed.
    Route(Route) = "route", Route;
    /// The routed experts of this rank: `output[t] = sum_e w_e down_e(silu(gate_e x) * up_e x)`.
    Experts(Experts) = "experts", Experts;
    /// The results of the chosen experts of this rank, not yet weighted and added: `output[t, i] = down_e(silu(gate_e x) * up_e x)`
    /// for e = `experts[t, i]`. Those of other ranks' experts are undefined, or zeros on a device that has
    /// [joined](super::Backend::join) others.
    ExpertRows(ExpertRows) = "expert_rows", ExpertRows;
    /// `output[t] = sum_i weights[t, i] rows[t, i]`, in the order of the row's choices: with [`Op::ExpertRows`] of all experts
    /// the same as [`Op::Experts`].
    ExpertsCombine(ExpertsCombine) = "experts_combine", ExpertsCombine;
    /// `output = silu(input[..n]) * input[n..]`.
    Swiglu(Swiglu) = "swiglu", Swiglu;
    /// `target += source`.
    Add(Add) = "add", Add;
    /// Sums a tensor over all ranks, in rank order; no effect with one rank.
    AllReduce(AllReduce) = "all_reduce", AllReduce;
    /// Concatenates the ranks' columns, in rank order; a copy where the output is as wide as the input.
    AllGather(AllGather) = "all_gather", AllGather;
    /// The next token of each output row: its best candidates and log-normaliser.
    Select(Select) = "select", Select;
    /// Draws a token for each [`Draw`](super::Draw) of the batch, and keeps the tokens for the next submission.
    Sample(Sample) = "sample", Sample;
    /// Returns this tensor's rows, with their values at this point of the program, in
    /// [`StepOutput::probes`](super::StepOutput::probes) of every submission.
    Probe(Tensor) = "probe";
    /// Probes a tensor of one row with an element per position; only as many elements are read back as the batch has
    /// positions. No later operation may write the tensor.
    ProbePositions(Tensor) = "probe";
    /// Statistics of what a KDA layer will write to its states; placed before the recurrence that they describe.
    TraceKda(TraceKda) = "trace_kda", TraceKda;
    /// The mean output gate of each head.
    TraceGate(TraceGate) = "trace_gate", TraceGate;
    /// The experts that a layer chose.
    TraceRoute(TraceRoute) = "trace_route", TraceRoute;
    /// One head's state after a KDA layer, for a probe.
    TraceState(TraceState) = "trace_state", TraceState;
    /// The attention weights of one head.
    TraceAttention(TraceAttention) = "trace_attention", TraceAttention;
    /// A residual sum and the norm after it: `target += source`, then `output = RMSNorm(target)`.
    AddNorm(AddNorm) = "add_norm", AddNorm;
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
    /// The parts of a block, some of which may be blocks; `None` for an operation without parts.
    #[must_use]
    pub fn parts(&self) -> Option<Vec<Op>> {
        match self {
            Self::AddNorm(both) => Some(both.ops()),
            Self::KdaBlock(block) => Some(block.ops()),
            Self::MlaBlock(block) => Some(block.ops()),
            Self::MlpBlock(block) => Some(block.ops()),
            Self::MoeBlock(block) => Some(block.ops()),
            _ => None,
        }
    }
}

/// A pool of either kind.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pool {
    /// KDA states.
    States(StatePool),
    /// MLA latents.
    Latents(LatentPool),
}

/// The operands of an operation, for printing and for common checks.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Operands {
    /// Tensors that it reads.
    pub reads: Vec<Tensor>,
    /// Weights that it reads.
    pub weights: Vec<Weight>,
    /// Tensors that it writes.
    pub writes: Vec<Tensor>,
    /// The pool that it reads or writes, and which layer of it.
    pub pool: Option<(Pool, usize)>,
    /// The drawn tokens that it reads or writes: a row per draw, not per token or output.
    pub drawn: Option<Tensor>,
}

impl Operands {
    fn new(reads: &[Tensor], weights: &[Weight], writes: &[Tensor]) -> Self {
        Self {
            reads: reads.to_vec(),
            weights: weights.to_vec(),
            writes: writes.to_vec(),
            pool: None,
            drawn: None,
        }
    }

    /// The same, for an operation with drawn tokens.
    fn with_drawn(self, drawn: Option<Tensor>) -> Self {
        Self { drawn, ..self }
    }

    /// The same, for an operation on a layer of the states.
    fn on_states(self, pool: StatePool, layer: usize) -> Self {
        let pool = Some((Pool::States(pool), layer));
        Self { pool, ..self }
    }

    /// The same, for an operation on a layer of the latents.
    fn on_latents(self, pool: LatentPool, layer: usize) -> Self {
        let pool = Some((Pool::Latents(pool), layer));
        Self { pool, ..self }
    }
}

impl Op {
    /// Its operands. Those of a block are its inputs and outputs, without its scratch tensors.
    #[must_use]
    pub fn operands(&self) -> Operands {
        let of = Operands::new;
        match self {
            Self::Embed(op) => of(&[], &[op.weight], &[op.output]).with_drawn(op.drawn),
            Self::RmsNorm(op) => of(&[op.input], &[op.weight], &[op.output]),
            Self::Linear(op) => of(&[op.input], &[op.weight], &[op.output]),
            Self::ShortConv(op) => {
                of(&[op.input], &[op.weight], &[op.output]).on_states(op.pool, op.layer)
            }
            Self::KdaGates(op) => {
                let (reads, writes) = ([op.decay, op.write], [op.gates, op.beta]);
                of(&reads, &[op.a_log, op.dt_bias], &writes)
            }
            Self::KdaRecurrence(op) => {
                of(&[op.qkv, op.gates, op.beta], &[], &[op.output]).on_states(op.pool, op.layer)
            }
            Self::GatedNorm(op) => of(&[op.input, op.gate], &[op.weight], &[op.output]),
            Self::MlaAppend(op) => of(&[op.input], &[op.weight], &[]).on_latents(op.pool, op.layer),
            Self::MlaPrefill(op) | Self::MlaDecode(op) => {
                of(&[op.query], &[op.kv_b], &[op.output]).on_latents(op.pool, op.layer)
            }
            Self::Route(op) => {
                let writes = [op.experts, op.weights];
                of(&[op.input], &[op.weight, op.bias], &writes)
            }
            Self::Experts(op) => {
                let reads = [op.input, op.experts, op.weights];
                of(&reads, &[op.gate, op.up, op.down], &[op.output])
            }
            Self::ExpertRows(op) => {
                let reads = [op.input, op.experts];
                of(&reads, &[op.gate, op.up, op.down], &[op.output])
            }
            Self::ExpertsCombine(op) => {
                let reads = [op.experts, op.weights, op.rows];
                of(&reads, &[], &[op.output])
            }
            Self::Swiglu(op) => of(&[op.input], &[], &[op.output]),
            Self::Add(op) => of(&[op.source, op.target], &[], &[op.target]),
            Self::AllReduce(op) => of(&[op.target], &[], &[op.target]),
            Self::AllGather(op) => of(&[op.input], &[], &[op.output]),
            Self::Select(op) => of(&[op.logits], &[], &[]),
            Self::Sample(op) => of(&[op.logits], &[], &[]).with_drawn(op.drawn),
            Self::Probe(tensor) | Self::ProbePositions(tensor) => of(&[*tensor], &[], &[]),
            Self::TraceKda(op) => {
                of(&[op.qkv, op.gates, op.beta], &[], &[op.output]).on_states(op.pool, op.layer)
            }
            Self::TraceGate(op) => of(&[op.gate], &[], &[op.output]),
            Self::TraceRoute(op) => of(&[op.experts, op.weights], &[], &[op.output]),
            Self::TraceState(op) => of(&[], &[], &[op.output]).on_states(op.pool, op.layer),
            Self::TraceAttention(op) => {
                of(&[op.query], &[op.kv_b], &[op.output]).on_latents(op.pool, op.layer)
            }
            Self::AddNorm(op) => {
                let reads = [op.source, op.target];
                of(&reads, &[op.weight], &[op.target, op.output])
            }
            Self::KdaBlock(op) => of(&[op.input], &[], &[op.output]).on_states(op.pool, op.layer),
            Self::MlaBlock(op) => of(&[op.input], &[], &[op.output]).on_latents(op.pool, op.layer),
            Self::MlpBlock(op) => of(&[op.input], &[], &[op.output]),
            Self::MoeBlock(op) => of(&[op.route.input], &[], &[op.output]),
        }
    }
}

/// One line: name, inputs, outputs. `t3[T,2304]` is a tensor with one row per token, `[O,..]` has one row per output,
/// `w12[12288,2304]` is a weight.
impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Operands {
            reads,
            weights,
            writes,
            pool,
            drawn,
        } = self.operands();
        let written: Vec<String> = writes.iter().map(ToString::to_string).collect();
        let mut read: Vec<String> = reads.iter().map(ToString::to_string).collect();
        read.extend(weights.iter().map(ToString::to_string));
        write!(f, "{:<16}{}", self.name(), read.join(" "))?;
        match pool {
            Some((Pool::States(_), layer)) => write!(f, " states[{layer}]")?,
            Some((Pool::Latents(_), layer)) => write!(f, " latents[{layer}]")?,
            None => {}
        }
        if let Some(drawn) = drawn {
            write!(f, " drawn t{}", drawn.id)?;
        }
        if !written.is_empty() {
            write!(f, " -> {}", written.join(" "))?;
        }
        Ok(())
    }
}

/// Arguments of [`Op::Embed`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Embed {
    /// `[vocabulary, d]`.
    pub weight: Weight,
    /// The tokens that an earlier submission drew, from [`Sample::drawn`]; without it a batch cannot be fed.
    pub drawn: Option<Tensor>,
    /// `[T, d]`.
    pub output: Tensor,
}

/// Arguments of [`Op::RmsNorm`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RmsNorm {
    /// `[T, d]`.
    pub input: Tensor,
    /// `[d]`.
    pub weight: Weight,
    /// Added to the mean of squares.
    pub eps: f32,
    /// `[T, d]`, or `[O, d]` for the requested rows only.
    pub output: Tensor,
}

/// Arguments of [`Op::Linear`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Linear {
    /// `[rows, in]`.
    pub input: Tensor,
    /// `[out, in]`.
    pub weight: Weight,
    /// `[rows, out]`.
    pub output: Tensor,
}

/// Arguments of [`Op::ShortConv`]. Channels are queries, keys, values, side by side.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShortConv {
    /// `[T, channels]`.
    pub input: Tensor,
    /// `[channels, taps]`; the last tap multiplies the current token.
    pub weight: Weight,
    /// The pool that holds the convolution states.
    pub pool: StatePool,
    /// KDA layer, counted among KDA layers.
    pub layer: usize,
    /// `[T, channels]`, after SiLU.
    pub output: Tensor,
}

/// Arguments of [`Op::KdaGates`] (Kimi Linear, equations of section 4: `alpha` and `beta`).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct KdaGates {
    /// `[T, H * K]`, the output of `f_b(f_a(x))`.
    pub decay: Tensor,
    /// `[T, H]`, the output of `b_proj(x)`.
    pub write: Tensor,
    /// `[H]`, f32.
    pub a_log: Weight,
    /// `[H * K]`, f32.
    pub dt_bias: Weight,
    /// `[T, H * K]`, f32: the natural logarithm of the decay, at most 0 and unbounded below.
    pub gates: Tensor,
    /// `[T, H]`, f32: the write strength in (0, 1).
    pub beta: Tensor,
}

/// How a recurrence runs over a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Form {
    /// Token by token for single tokens, by chunks for longer segments.
    Auto,
    /// By chunks, for any length.
    Chunk,
    /// Token by token, for any length.
    Step,
}

/// Added to the sum of squares under the root that normalises KDA's queries and keys.
pub const KEY_EPS: f32 = 1e-6;

/// Arguments of [`Op::KdaRecurrence`] (Kimi Linear, equation 1 and its chunkwise form).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct KdaRecurrence {
    /// `[T, channels]`: queries and keys, not yet normalised, and values. `x / sqrt(sum x^2 + 1e-6)` is applied to
    /// queries and keys, and K^-1/2 to queries.
    pub qkv: Tensor,
    /// `[T, H * K]`, f32: log decay.
    pub gates: Tensor,
    /// `[T, H]`, f32: write strength.
    pub beta: Tensor,
    /// The pool that holds the states.
    pub pool: StatePool,
    /// KDA layer, counted among KDA layers.
    pub layer: usize,
    /// Chunkwise, stepwise, or by the segment's length.
    pub form: Form,
    /// `[T, H * V]`.
    pub output: Tensor,
}

/// Arguments of [`Op::GatedNorm`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct GatedNorm {
    /// `[T, H * V]`.
    pub input: Tensor,
    /// `[T, H * V]`, before the sigmoid.
    pub gate: Tensor,
    /// `[V]`, shared by all heads.
    pub weight: Weight,
    /// Added to the mean of squares of a head.
    pub eps: f32,
    /// `[T, H * V]`.
    pub output: Tensor,
}

/// Arguments of [`Op::MlaAppend`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct MlaAppend {
    /// `[T, latent + rope]`, the output of `kv_a_proj_with_mqa`.
    pub input: Tensor,
    /// `[latent]`, `kv_a_layernorm`.
    pub weight: Weight,
    /// Added to the mean of squares of the latent part.
    pub eps: f32,
    /// The pool that takes the rows.
    pub pool: LatentPool,
    /// MLA layer, counted among MLA layers.
    pub layer: usize,
}

/// The segments of a batch that an operation runs on; rows of the others are left as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Segments {
    /// All of them.
    All,
    /// Those of a single token.
    Single,
    /// Those of two tokens or more.
    Several,
}

impl Segments {
    /// Whether a segment of `length` tokens is among them.
    #[must_use]
    pub fn contains(self, length: usize) -> bool {
        match self {
            Self::All => true,
            Self::Single => length == 1,
            Self::Several => length > 1,
        }
    }
}

/// Arguments of [`Op::MlaPrefill`] and [`Op::MlaDecode`].
/// Scores are scaled by `(nope + rope)^-1/2`; there are no positions.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct MlaAttention {
    /// `[T, H * (nope + rope)]`.
    pub query: Tensor,
    /// `[H * (nope + value), latent]`: for each head the rows of the key's expansion, then those of the value's.
    pub kv_b: Weight,
    /// Width of the part of a key that is expanded from the latent.
    pub nope: usize,
    /// Width of a value.
    pub value: usize,
    /// The pool that holds the latents, those of this batch's tokens included.
    pub pool: LatentPool,
    /// MLA layer, counted among MLA layers.
    pub layer: usize,
    /// The segments to run on.
    pub segments: Segments,
    /// `[T, H * value]`.
    pub output: Tensor,
}

/// Arguments of [`Op::Route`]: `s = sigmoid(W x)`; the best `top_k` of `s + bias` are chosen (of
/// equal ones the lower id first); their weights are `s` without the bias.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Route {
    /// `[T, d]`.
    pub input: Tensor,
    /// `[experts, d]`.
    pub weight: Weight,
    /// `[experts]`: `e_score_correction_bias`.
    pub bias: Weight,
    /// Groups that the experts are cut into.
    pub groups: usize,
    /// Groups that experts are chosen from: those with the greatest sums of their two best biased scores.
    pub top_groups: usize,
    /// Whether the chosen weights are divided by their sum + 1e-20.
    pub renormalize: bool,
    /// Multiplies the weights last.
    pub scale: f32,
    /// `[T, top_k]`, [`Element::Index`](super::Element::Index): experts, best biased score first.
    pub experts: Tensor,
    /// `[T, top_k]`, f32: their weights.
    pub weights: Tensor,
}

/// Arguments of [`Op::Experts`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Experts {
    /// `[T, d]`.
    pub input: Tensor,
    /// `[T, top_k]`, from [`Route::experts`].
    pub experts: Tensor,
    /// `[T, top_k]`, from [`Route::weights`].
    pub weights: Tensor,
    /// `[local experts, n, d]` (w1 on disk).
    pub gate: Weight,
    /// `[local experts, n, d]` (w3 on disk).
    pub up: Weight,
    /// `[local experts, d, n]` (w2 on disk).
    pub down: Weight,
    /// The id of the first expert of this rank; other experts add nothing.
    pub first_expert: usize,
    /// `[T, d]`, summed in the order of the row's choices.
    pub output: Tensor,
}

/// Arguments of [`Op::ExpertRows`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExpertRows {
    /// `[T, d]`.
    pub input: Tensor,
    /// `[T, top_k]`, from [`Route::experts`].
    pub experts: Tensor,
    /// `[local experts, n, d]` (w1 on disk).
    pub gate: Weight,
    /// `[local experts, n, d]` (w3 on disk).
    pub up: Weight,
    /// `[local experts, d, n]` (w2 on disk).
    pub down: Weight,
    /// The id of the first expert of this rank.
    pub first_expert: usize,
    /// `[T, top_k * d]`, f32.
    pub output: Tensor,
}

/// Arguments of [`Op::ExpertsCombine`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExpertsCombine {
    /// `[T, top_k]`, from [`Route::experts`].
    pub experts: Tensor,
    /// `[T, top_k]`, from [`Route::weights`].
    pub weights: Tensor,
    /// `[T, top_k * d]`, f32: from [`ExpertRows::output`] of every rank.
    pub rows: Tensor,
    /// `[T, d]`.
    pub output: Tensor,
}

/// Arguments of [`Op::Swiglu`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Swiglu {
    /// `[T, 2 n]`: gate, then up.
    pub input: Tensor,
    /// `[T, n]`.
    pub output: Tensor,
}

/// Arguments of [`Op::Add`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Add {
    /// `[T, d]`.
    pub source: Tensor,
    /// `[T, d]`, added to.
    pub target: Tensor,
}

/// Arguments of [`Op::AllReduce`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AllReduce {
    /// `[T, d]`: this rank's part before, the sum after.
    pub target: Tensor,
}

/// Arguments of [`Op::AllGather`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AllGather {
    /// `[rows, n]`, a [split tensor](super::Backend::split_tensor).
    pub input: Tensor,
    /// `[rows, n]`, the columns of all ranks.
    pub output: Tensor,
}

/// Arguments of [`Op::Select`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Select {
    /// `[O, vocabulary]`, f32.
    pub logits: Tensor,
    /// Candidates reported for each row, at least 1.
    pub candidates: usize,
    /// Whether whole rows are read back as well.
    pub keep_rows: bool,
}

/// Arguments of [`Op::Sample`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// `[O, vocabulary]`, f32.
    pub logits: Tensor,
    /// Maximum sizes of a batch's draws.
    pub capacity: DrawCapacity,
    /// `[draws, 2]`, [`Element::Index`](super::Element::Index): takes the drawn tokens, `u32::MAX` where none is allowed, and
    /// the bits of their logits; of more draws than it has rows, the first.
    pub drawn: Option<Tensor>,
}
