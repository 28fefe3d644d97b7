//! The gated delta rule one token at a time: the definition (Kimi Linear, equation 1), for decoding.

use super::kda_recurrence::Tokens;
use super::math::{add_scaled, exp, normal};

/// Runs all of `tokens` through one head: updates `state` `[K, V]` and writes `output` `[length, V]`.
#[inline(always)]
pub(super) fn kda_step(tokens: &Tokens<'_>, state: &mut [f32], output: &mut [f32]) {
    let (k, v) = (tokens.key_width, tokens.value_width);
    let mut write = vec![0.0; v];
    for (t, output) in output.chunks_exact_mut(v).enumerate() {
        let (query, key, gates) = (
            &tokens.query[t * k..],
            &tokens.key[t * k..],
            &tokens.gates[t * k..],
        );
        // The state decays, then is multiplied with the key: its prediction of the value.
        write.fill(0.0);
        for (d, row) in state.chunks_exact_mut(v).enumerate() {
            let decay = exp(gates[d]);
            for (write, value) in write.iter_mut().zip(row) {
                *value = normal(*value * decay);
                *write += key[d] * *value;
            }
        }
        // The prediction's error, times beta, is written.
        for (write, value) in write.iter_mut().zip(&tokens.value[t * v..]) {
            *write = tokens.beta[t] * (value - *write);
        }
        output.fill(0.0);
        for (d, row) in state.chunks_exact_mut(v).enumerate() {
            add_scaled(row, key[d], &write);
            add_scaled(output, query[d], row);
        }
    }
}
