//! Root mean square normalisation (Zhang and Sennrich, arXiv 1910.07467), a row at a time.

use rayon::prelude::*;

use super::math::{inverse_rms, vectorised};

/// `output[i] = input[rows[i]] / sqrt(mean(input^2) + eps) * weight`: `[T, d] -> [rows, d]`.
pub(super) fn rms_norm(
    input: &[f32],
    rows: impl IndexedParallelIterator<Item = usize>,
    weight: &[f32],
    eps: f32,
    output: &mut [f32],
) {
    let d = weight.len();
    output
        .par_chunks_exact_mut(d)
        .zip(rows)
        .for_each(|(output, row)| {
            vectorised(
                #[inline(always)]
                || normalise(&input[row * d..(row + 1) * d], weight, eps, output),
            );
        });
}

/// One row.
#[inline(always)]
pub(super) fn normalise(input: &[f32], weight: &[f32], eps: f32, output: &mut [f32]) {
    let scale = inverse_rms(input, eps);
    for ((output, input), weight) in output.iter_mut().zip(input).zip(weight) {
        *output = input * scale * weight;
    }
}
