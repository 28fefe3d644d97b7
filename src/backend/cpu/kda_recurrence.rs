//! The recurrence over a ragged batch: selects the form, and reads and writes the states.
//!
//! The two forms are in `kda_step` and `kda_chunk`; here each head of each segment becomes one independent task.

use std::ops::Range;

use rayon::prelude::*;

use super::kda_chunk::kda_chunk;
use super::kda_step::kda_step;
use super::math::{dot, vectorised};
use super::memory::States;
use crate::backend::{Form, KEY_EPS, Segment, StateLayout};

/// Consecutive tokens of one head, contiguous: queries and keys normalised, queries scaled by K^-1/2.
pub(super) struct Tokens<'a> {
    pub(super) key_width: usize,
    pub(super) value_width: usize,
    /// `[length, K]`.
    pub(super) query: &'a [f32],
    /// `[length, K]`.
    pub(super) key: &'a [f32],
    /// `[length, V]`.
    pub(super) value: &'a [f32],
    /// `[length, K]`: log decay.
    pub(super) gates: &'a [f32],
    /// `[length]`: write strength.
    pub(super) beta: &'a [f32],
}

impl Tokens<'_> {
    #[inline(always)]
    pub(super) fn length(&self) -> usize {
        self.beta.len()
    }

    /// A range of the tokens.
    #[inline(always)]
    pub(super) fn range(&self, range: Range<usize>) -> Self {
        let (k, v) = (self.key_width, self.value_width);
        let (keys, values) = (
            range.start * k..range.end * k,
            range.start * v..range.end * v,
        );
        Self {
            key_width: k,
            value_width: v,
            query: &self.query[keys.clone()],
            key: &self.key[keys.clone()],
            value: &self.value[values],
            gates: &self.gates[keys],
            beta: &self.beta[range],
        }
    }
}

/// The rows of one segment.
pub(super) struct Rows<'a> {
    /// `[length, channels]`.
    pub(super) qkv: &'a [f32],
    /// `[length, H * K]`.
    pub(super) gates: &'a [f32],
    /// `[length, H]`.
    pub(super) beta: &'a [f32],
}

/// The results of one head besides its last state: its outputs `[length, V]`, and its states `[K, V]` at each checkpoint.
struct Head {
    output: Vec<f32>,
    states: Vec<Vec<f32>>,
}

/// Runs one segment through all heads; writes `output` `[length, H * V]` and the states of the segment's slots.
pub(super) fn kda_recurrence(
    rows: &Rows<'_>,
    form: Form,
    states: &mut States,
    layout: &StateLayout,
    layer: usize,
    segment: &Segment,
    output: &mut [f32],
) {
    let chunked = match form {
        Form::Auto => segment.length > 1,
        Form::Chunk => true,
        Form::Step => false,
    };
    let (heads, v, len) = (
        layout.value_heads,
        layout.value_width,
        layout.key_width * layout.value_width,
    );
    // States are updated in place, in the slot that they are written to.
    match segment.slot_in {
        Some(slot) if slot == segment.slot_out => {}
        Some(slot) => {
            let before = states.state(layer, slot).to_vec();
            let after = states.state_mut(layer, segment.slot_out);
            after.copy_from_slice(&before);
        }
        None => states.state_mut(layer, segment.slot_out).fill(0.0),
    }
    let results: Vec<Head> = states
        .state_mut(layer, segment.slot_out)
        .par_chunks_exact_mut(len)
        .enumerate()
        .map(|(head, state)| {
            vectorised(
                #[inline(always)]
                || run_head(rows, chunked, layout, head, segment, state),
            )
        })
        .collect();
    for (head, result) in results.iter().enumerate() {
        for (output, row) in output
            .chunks_exact_mut(heads * v)
            .zip(result.output.chunks_exact(v))
        {
            output[head * v..(head + 1) * v].copy_from_slice(row);
        }
        let slots = segment.checkpoints.iter().map(|checkpoint| checkpoint.slot);
        for (slot, state) in slots.zip(&result.states) {
            states.state_mut(layer, slot)[head * len..(head + 1) * len].copy_from_slice(state);
        }
    }
}

#[inline(always)]
fn run_head(
    rows: &Rows<'_>,
    chunked: bool,
    layout: &StateLayout,
    head: usize,
    segment: &Segment,
    state: &mut [f32],
) -> Head {
    let StateLayout {
        key_heads,
        value_heads,
        key_width: k,
        value_width: v,
        ..
    } = *layout;
    let (channels, key_head) = (layout.channels(), head / (value_heads / key_heads));
    let gather = |rows: &[f32], stride: usize, first: usize, width: usize| -> Vec<f32> {
        let mut gathered = Vec::with_capacity(segment.length * width);
        for row in rows.chunks_exact(stride) {
            gathered.extend_from_slice(&row[first..first + width]);
        }
        gathered
    };
    let mut query = gather(rows.qkv, channels, key_head * k, k);
    let mut key = gather(rows.qkv, channels, (key_heads + key_head) * k, k);
    query
        .chunks_exact_mut(k)
        .for_each(|row| normalise(row, (k as f32).sqrt()));
    key.chunks_exact_mut(k).for_each(|row| normalise(row, 1.0));
    let value = gather(rows.qkv, channels, 2 * key_heads * k + head * v, v);
    let gates = gather(rows.gates, value_heads * k, head * k, k);
    let beta = gather(rows.beta, value_heads, head, 1);
    let tokens = Tokens {
        key_width: k,
        value_width: v,
        query: &query,
        key: &key,
        value: &value,
        gates: &gates,
        beta: &beta,
    };
    let mut output = vec![0.0; segment.length * v];
    let mut states = Vec::with_capacity(segment.checkpoints.len());
    let mut first = 0;
    // A new chunk starts at each checkpoint, so that a sequence resumed there repeats the same operations.
    let checkpoints = segment
        .checkpoints
        .iter()
        .map(|checkpoint| checkpoint.after);
    for (i, last) in checkpoints.chain([segment.length]).enumerate() {
        let (tokens, output) = (tokens.range(first..last), &mut output[first * v..last * v]);
        if chunked {
            kda_chunk(&tokens, state, output);
        } else {
            kda_step(&tokens, state, output);
        }
        if i < segment.checkpoints.len() {
            states.push(state.to_vec());
        }
        first = last;
    }
    Head { output, states }
}

/// `x / sqrt(sum x^2 + 1e-6) / divisor`.
#[inline(always)]
fn normalise(row: &mut [f32], divisor: f32) {
    let norm = (dot(row, row) + KEY_EPS).sqrt() * divisor;
    row.iter_mut().for_each(|value| *value /= norm);
}
