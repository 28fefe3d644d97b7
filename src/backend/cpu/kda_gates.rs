//! The gates of a KDA layer: log decay by channel and write strength by head.

use rayon::prelude::*;

use super::math::{sigmoid, softplus};

/// `gates = -exp(A_log[h]) softplus(decay + dt_bias)`: `[T, H * K]`. No lower bound: a decay may underflow to 0.
pub(super) fn log_decay(decay: &[f32], a_log: &[f32], dt_bias: &[f32], gates: &mut [f32]) {
    let (channels, width) = (dt_bias.len(), dt_bias.len() / a_log.len());
    gates
        .par_chunks_exact_mut(channels)
        .zip(decay.par_chunks_exact(channels))
        .for_each(|(gates, decay)| {
            let heads = gates
                .chunks_exact_mut(width)
                .zip(decay.chunks_exact(width))
                .zip(dt_bias.chunks_exact(width));
            for (((gates, decay), dt_bias), a_log) in heads.zip(a_log) {
                let rate = -a_log.exp();
                for ((gate, decay), dt_bias) in gates.iter_mut().zip(decay).zip(dt_bias) {
                    *gate = rate * softplus(decay + dt_bias);
                }
            }
        });
}

/// `beta = sigmoid(write)`: `[T, H]`.
pub(super) fn write_strength(write: &[f32], beta: &mut [f32]) {
    beta.iter_mut()
        .zip(write)
        .for_each(|(beta, write)| *beta = sigmoid(*write));
}
