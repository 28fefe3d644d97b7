//! The token embedding: one row of the weight per token.

use rayon::prelude::*;

use super::memory::CpuWeight;
use crate::backend::Batch;

/// The tokens of a batch, of which some are fed by `drawn`, `[draws, 2]`: tokens, or numbers beyond the vocabulary where none was
/// allowed, and logits.
pub(super) fn tokens(batch: &Batch, drawn: &[u32], vocabulary: usize) -> Vec<u32> {
    let mut tokens = batch.tokens.clone();
    for fed in &batch.fed {
        tokens[fed.row] = drawn[2 * fed.draw].min(vocabulary as u32 - 1);
    }
    tokens
}

/// `output[t] = weight[tokens[t]]`: `[T] -> [T, d]`.
pub(super) fn embed(tokens: &[u32], weight: &CpuWeight, output: &mut [f32]) {
    output
        .par_chunks_exact_mut(weight.columns())
        .zip(tokens)
        .for_each(|(row, token)| weight.row(*token as usize, row));
}
