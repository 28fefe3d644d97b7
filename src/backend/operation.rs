//! The arguments of every operation, with their shapes: T tokens, O output rows, H heads, K and V widths of a key and
//! a value, d the model's width.

use serde::{Deserialize, Serialize};

use super::{LatentPool, StatePool, Tensor, Weight};

/// Arguments of [`Op::Embed`](super::Op::Embed).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Embed {
    /// `[vocabulary, d]`.
    pub weight: Weight,
    /// `[T, d]`.
    pub output: Tensor,
}

/// Arguments of [`Op::RmsNorm`](super::Op::RmsNorm).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RmsNorm {
    /// `[T, d]`.
    pub input: Tensor,
    /// `[d]`.
    pub weight: Weight,
    /// Added to the mean of squares.
    pub eps: f32,
    /// `[T, d]`, or `[O, d]` for the wanted rows alone.
    pub output: Tensor,
}

/// Arguments of [`Op::Linear`](super::Op::Linear).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Linear {
    /// `[rows, in]`.
    pub input: Tensor,
    /// `[out, in]`.
    pub weight: Weight,
    /// `[rows, out]`.
    pub output: Tensor,
}

/// Arguments of [`Op::ShortConv`](super::Op::ShortConv). Channels are queries, keys, values, side by side.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShortConv {
    /// `[T, channels]`.
    pub input: Tensor,
    /// `[channels, taps]`; the last tap multiplies the current token.
    pub weight: Weight,
    /// The pool that holds the tails.
    pub pool: StatePool,
    /// KDA layer, counted among KDA layers.
    pub layer: usize,
    /// `[T, channels]`, after SiLU.
    pub output: Tensor,
}

/// Arguments of [`Op::KdaGates`](super::Op::KdaGates) (Kimi Linear, equations of section 4: `alpha` and `beta`).
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

/// How a recurrence runs over a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Form {
    /// Token by token for single tokens, by chunks for longer pieces.
    Auto,
    /// By chunks, whatever the length.
    Chunk,
    /// Token by token, whatever the length.
    Step,
}

/// Added to the sum of squares under the root that normalises KDA's queries and keys.
pub const KEY_EPS: f32 = 1e-6;

/// Arguments of [`Op::KdaRecurrence`](super::Op::KdaRecurrence) (Kimi Linear, equation 1 and its chunkwise form).
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
    /// Chunkwise, stepwise, or by the piece's length.
    pub form: Form,
    /// `[T, H * V]`.
    pub output: Tensor,
}

/// Arguments of [`Op::GatedNorm`](super::Op::GatedNorm).
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

/// Arguments of [`Op::MlaAppend`](super::Op::MlaAppend).
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

/// The pieces of a batch that an operation runs on; rows of the others are left as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Pieces {
    /// All of them.
    All,
    /// Those of a single token.
    Single,
    /// Those of two tokens or more.
    Several,
}

impl Pieces {
    /// Whether a piece of `length` tokens is among them.
    #[must_use]
    pub fn contains(self, length: usize) -> bool {
        match self {
            Self::All => true,
            Self::Single => length == 1,
            Self::Several => length > 1,
        }
    }
}

/// Arguments of [`Op::MlaPrefill`](super::Op::MlaPrefill) and [`Op::MlaDecode`](super::Op::MlaDecode).
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
    /// The pieces to run on.
    pub pieces: Pieces,
    /// `[T, H * value]`.
    pub output: Tensor,
}

/// Arguments of [`Op::Route`](super::Op::Route): `s = sigmoid(W x)`; the best `top_k` of `s + bias` are chosen (of
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

/// Arguments of [`Op::Experts`](super::Op::Experts).
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
    /// The id of the first expert held here; others add nothing.
    pub first_expert: usize,
    /// `[T, d]`, summed in the order of the row's choices.
    pub output: Tensor,
}

/// Arguments of [`Op::Swiglu`](super::Op::Swiglu).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Swiglu {
    /// `[T, 2 n]`: gate, then up.
    pub input: Tensor,
    /// `[T, n]`.
    pub output: Tensor,
}

/// Arguments of [`Op::Add`](super::Op::Add).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Add {
    /// `[T, d]`.
    pub source: Tensor,
    /// `[T, d]`, added to.
    pub target: Tensor,
}

/// Arguments of [`Op::AllReduce`](super::Op::AllReduce).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AllReduce {
    /// `[T, d]`: this rank's part before, the sum after.
    pub target: Tensor,
}

/// Arguments of [`Op::AllGather`](super::Op::AllGather).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AllGather {
    /// `[rows, n]`.
    pub input: Tensor,
    /// `[rows, ranks * n]`.
    pub output: Tensor,
}

/// Arguments of [`Op::Select`](super::Op::Select).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Select {
    /// `[O, vocabulary]`, f32.
    pub logits: Tensor,
    /// Candidates reported for each row, at least 1.
    pub candidates: usize,
    /// Whether whole rows are read back as well.
    pub keep_rows: bool,
}
