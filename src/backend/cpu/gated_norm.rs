//! The output gate of a KDA layer: a norm over each head, times a sigmoid gate.

use rayon::prelude::*;

use super::math::{inverse_rms, sigmoid, vectorised};

/// `output = RMSNorm_head(input) * weight * sigmoid(gate)`: all are `[T, H * V]` except `weight`, `[V]`.
pub(super) fn gated_norm(
    input: &[f32],
    gate: &[f32],
    weight: &[f32],
    eps: f32,
    output: &mut [f32],
) {
    let v = weight.len();
    let heads = input.par_chunks_exact(v).zip(gate.par_chunks_exact(v));
    output
        .par_chunks_exact_mut(v)
        .zip(heads)
        .with_min_len(32)
        .for_each(|(output, (input, gate))| {
            vectorised(
                #[inline(always)]
                || {
                    let scale = inverse_rms(input, eps);
                    for i in 0..v {
                        output[i] = input[i] * scale * weight[i] * sigmoid(gate[i]);
                    }
                },
            );
        });
}
