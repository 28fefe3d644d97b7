//! The token embedding: one row of the weight per token.

use rayon::prelude::*;

use super::memory::CpuWeight;

/// `output[t] = weight[tokens[t]]`: `[T] -> [T, d]`.
pub(super) fn embed(tokens: &[u32], weight: &CpuWeight, output: &mut [f32]) {
    output
        .par_chunks_exact_mut(weight.columns())
        .zip(tokens)
        .for_each(|(row, token)| weight.row(*token as usize, row));
}
