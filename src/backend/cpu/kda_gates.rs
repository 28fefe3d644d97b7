//! The gates of a KDA layer: log decay per channel and write strength per head.

use rayon::prelude::*;

use super::math::{sigmoid, softplus, vectorised};

/// Heads that a thread computes together.
const HEADS: usize = 4;

/// `gates = -exp(A_log[h]) softplus(decay + dt_bias)`: `[T, H * K]`. No lower bound: a decay may underflow to 0.
pub(super) fn log_decay(decay: &[f32], a_log: &[f32], dt_bias: &[f32], gates: &mut [f32]) {
    let width = dt_bias.len() / a_log.len();
    let heads = a_log.len();
    gates
        .par_chunks_exact_mut(width)
        .zip(decay.par_chunks_exact(width))
        .enumerate()
        .with_min_len(HEADS)
        .for_each(|(i, (gates, decay))| {
            let head = i % heads;
            let rate = -a_log[head].exp();
            let dt_bias = &dt_bias[head * width..(head + 1) * width];
            vectorised(
                #[inline(always)]
                || {
                    for ((gate, decay), dt_bias) in gates.iter_mut().zip(decay).zip(dt_bias) {
                        *gate = rate * softplus(decay + dt_bias);
                    }
                },
            );
        });
}

/// `beta = sigmoid(write)`: `[T, H]`.
pub(super) fn write_strength(write: &[f32], beta: &mut [f32]) {
    vectorised(
        #[inline(always)]
        || {
            for (beta, write) in beta.iter_mut().zip(write) {
                *beta = sigmoid(*write);
            }
        },
    );
}
