//! The gates of a KDA layer: log decay by channel and write strength by head.

use rayon::prelude::*;

use super::math::{sigmoid, softplus};

/// `gates = -exp(A_log[h]) softplus(decay + dt_bias)`: `[T, H * K]`. No lower bound: a decay may underflow to 0.
pub(super) fn log_decay(decay: &[f32], a_log: &[f32], dt_bias: &[f32], gates: &mut [f32]) {
    let width = dt_bias.len() / a_log.len();
    gates
        .par_chunks_exact_mut(dt_bias.len())
        .zip(decay.par_chunks_exact(dt_bias.len()))
        .for_each(|(gates, decay)| {
            for (i, (gate, decay)) in gates.iter_mut().zip(decay).enumerate() {
                *gate = -a_log[i / width].exp() * softplus(decay + dt_bias[i]);
            }
        });
}

/// `beta = sigmoid(write)`: `[T, H]`.
pub(super) fn write_strength(write: &[f32], beta: &mut [f32]) {
    beta.iter_mut()
        .zip(write)
        .for_each(|(beta, write)| *beta = sigmoid(*write));
}
