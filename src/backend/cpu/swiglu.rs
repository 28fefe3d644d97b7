//! The gated activation of an MLP (Shazeer, arXiv 2002.05202).

use rayon::prelude::*;

use super::math::{silu, vectorised};

/// `output = silu(gate) * up`, where a row of `input` is gate, then up: `[T, 2 n] -> [T, n]`.
pub(super) fn swiglu(input: &[f32], width: usize, output: &mut [f32]) {
    output
        .par_chunks_exact_mut(width)
        .zip(input.par_chunks_exact(2 * width))
        .for_each(|(output, input)| {
            let (gate, up) = input.split_at(width);
            vectorised(
                #[inline(always)]
                || multiply(gate, up, output),
            );
        });
}

/// One row.
#[inline(always)]
pub(super) fn multiply(gate: &[f32], up: &[f32], output: &mut [f32]) {
    for ((output, gate), up) in output.iter_mut().zip(gate).zip(up) {
        *output = silu(*gate) * up;
    }
}
