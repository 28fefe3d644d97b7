//! Operations of a trace: reductions that are small enough to read back for every token.
//!
//! They are compiled only into steps that are traced, and run on segments of a single token; rows of other segments are zero.
//! An operation that every layer has writes its layer's part of an output for all layers, so that the results of a token are
//! read back at the end, in a few transfers.

use serde::{Deserialize, Serialize};

use super::{LatentPool, StateLayout, StatePool, Tensor, Weight};

/// Number of values at the start of a head's row of [`TraceKda::output`], in this order: the state's Frobenius norm after the
/// token, that of what is written, the norm of the error that it corrects, the mean decay, the write strength.
pub const KDA_NUMBERS: usize = 5;

/// The width of one head's row in [`TraceKda::output`]: its numbers, then the log decay of its K channels.
#[must_use]
pub fn kda_row(layout: &StateLayout) -> usize {
    KDA_NUMBERS + layout.key_width
}

/// Arguments of [`Op::TraceKda`](super::Op::TraceKda), which is compiled before the recurrence that it describes: it
/// reads the state that the recurrence is about to edit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TraceKda {
    /// `[T, channels]`: as in [`KdaRecurrence`](super::KdaRecurrence).
    pub qkv: Tensor,
    /// `[T, H * K]`, f32: log decay.
    pub gates: Tensor,
    /// `[T, H]`, f32: write strength.
    pub beta: Tensor,
    /// The pool that holds the states.
    pub pool: StatePool,
    /// KDA layer, counted among KDA layers.
    pub layer: usize,
    /// `[T, layers * H * kda_row]`, f32: a row per head; only this layer's are written.
    pub output: Tensor,
}

/// Arguments of [`Op::TraceGate`](super::Op::TraceGate).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TraceGate {
    /// `[T, H * V]`: the output gate, before the sigmoid.
    pub gate: Tensor,
    /// The shapes of the layers' states.
    pub layout: StateLayout,
    /// KDA layer, counted among KDA layers.
    pub layer: usize,
    /// `[T, layers * H]`, f32: the mean of each head's gate after the sigmoid; only this layer's are written.
    pub output: Tensor,
}

/// Arguments of [`Op::TraceRoute`](super::Op::TraceRoute), which is compiled after the router.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TraceRoute {
    /// `[T, top]`: the experts that the router chose, best first.
    pub experts: Tensor,
    /// `[T, top]`, f32: their weights.
    pub weights: Tensor,
    /// Layer, counted among layers with experts.
    pub layer: usize,
    /// The number of layers with experts.
    pub layers: usize,
    /// `[T, layers * 2 * top]`, f32: the experts' ids, then their weights; only this layer's are written.
    pub output: Tensor,
}

/// Arguments of [`Op::TraceState`](super::Op::TraceState), which is compiled after the recurrence: one head's state after the
/// token.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TraceState {
    /// The pool that holds the states.
    pub pool: StatePool,
    /// KDA layer, counted among KDA layers.
    pub layer: usize,
    /// The head, counted among this rank's.
    pub head: usize,
    /// `[T, K * V]`, f32, in the order `[K, V]`.
    pub output: Tensor,
}

/// Arguments of [`Op::TraceAttention`](super::Op::TraceAttention): the weights of one head, over all positions.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TraceAttention {
    /// `[T, H * (nope + rope)]`.
    pub query: Tensor,
    /// `[H * (nope + value), latent]`.
    pub kv_b: Weight,
    /// Width of the part of a key that is expanded from the latent.
    pub nope: usize,
    /// Width of a value.
    pub value: usize,
    /// The pool that holds the latents, this token's included.
    pub pool: LatentPool,
    /// MLA layer, counted among MLA layers.
    pub layer: usize,
    /// The head, counted among this rank's.
    pub head: usize,
    /// `[T, positions]`, f32: the attention weight of each position; zero for positions after the token's own, and undefined
    /// beyond the batch's positions.
    pub output: Tensor,
}
