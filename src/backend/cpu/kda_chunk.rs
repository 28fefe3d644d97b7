//! The gated delta rule in chunks of sixteen tokens: the chunkwise form of Kimi Linear (section 3.2), for prefill.
//!
//! Gates have no lower bound, so `exp(G_i - G_j)` is never computed as `exp(G_i) exp(-G_j)`, which overflows. Each block of
//! the two C x C matrices has an anchor between its rows and its columns instead (dyadic anchors): both factors are then
//! exponentials of sums of gates, at most 1, and an underflow to 0 is the correct result.

use super::kda_recurrence::Tokens;
use super::math::{add_scaled, dot, exp, normal};

/// Tokens per chunk.
pub(super) const CHUNK: usize = 16;

/// `A[i][j]` of one chunk.
type Square = [[f32; CHUNK]; CHUNK];

/// Runs all of `tokens` through one head: updates `state` `[K, V]` and writes `output` `[length, V]`.
#[inline(always)]
pub(super) fn kda_chunk(tokens: &Tokens<'_>, state: &mut [f32], output: &mut [f32]) {
    let (k, v) = (tokens.key_width, tokens.value_width);
    let mut scratch = Scratch {
        decayed: vec![0.0; CHUNK * k],
        decayed_query: vec![0.0; CHUNK * k],
        decay: vec![0.0; k],
        write: vec![0.0; CHUNK * v],
    };
    for first in (0..tokens.length()).step_by(CHUNK) {
        let last = tokens.length().min(first + CHUNK);
        chunk(
            &tokens.range(first..last),
            state,
            &mut output[first * v..last * v],
            &mut scratch,
        );
    }
}

struct Scratch {
    /// `[C, K]`: keys times a decay.
    decayed: Vec<f32>,
    /// `[C, K]`: queries times a decay.
    decayed_query: Vec<f32>,
    /// `[K]`: a running sum of gates.
    decay: Vec<f32>,
    /// `[C, V]`: U, the values that each token writes.
    write: Vec<f32>,
}

#[inline(always)]
fn chunk(tokens: &Tokens<'_>, state: &mut [f32], output: &mut [f32], scratch: &mut Scratch) {
    let (k, v, c) = (tokens.key_width, tokens.value_width, tokens.length());
    let (a_kk, a_qk) = scores(tokens, scratch);
    let Scratch {
        decayed,
        decayed_query,
        decay,
        write,
    } = scratch;
    let write = &mut write[..c * v];

    // (K * exp(G)) S and (Q * exp(G)) S, with G the inclusive sum of gates from the chunk's start.
    decay.fill(0.0);
    for i in 0..c {
        for d in 0..k {
            decay[d] += tokens.gates[i * k + d];
            let factor = exp(decay[d]);
            decayed[i * k + d] = normal(tokens.key[i * k + d] * factor);
            decayed_query[i * k + d] = normal(tokens.query[i * k + d] * factor);
        }
    }
    write.fill(0.0);
    output.fill(0.0);
    for (d, row) in state.chunks_exact(v).enumerate() {
        for i in 0..c {
            add_scaled(&mut write[i * v..(i + 1) * v], decayed[i * k + d], row);
            add_scaled(
                &mut output[i * v..(i + 1) * v],
                decayed_query[i * k + d],
                row,
            );
        }
    }

    // U = (I + A_kk)^-1 [beta (V - (K * exp(G)) S)], by forward substitution: the UT transform.
    for i in 0..c {
        let (before, rest) = write.split_at_mut(i * v);
        let row = &mut rest[..v];
        for (write, value) in row.iter_mut().zip(&tokens.value[i * v..]) {
            *write = tokens.beta[i] * (value - *write);
        }
        for (j, before) in before.chunks_exact(v).enumerate() {
            add_scaled(row, -a_kk[i][j], before);
        }
    }

    // O = (Q * exp(G)) S + A_qk U.
    for (i, output) in output.chunks_exact_mut(v).enumerate() {
        for (j, write) in write.chunks_exact(v).enumerate().take(i + 1) {
            add_scaled(output, a_qk[i][j], write);
        }
    }

    // S' = diag(exp(G_C)) S + Kr^T U. The gates of Kr are summed backwards from the chunk's end: a difference of sums from
    // the start would cancel under strong decay.
    decay.fill(0.0);
    for i in (0..c).rev() {
        for d in 0..k {
            decayed[i * k + d] = normal(tokens.key[i * k + d] * exp(decay[d]));
            decay[d] += tokens.gates[i * k + d];
        }
    }
    for (d, row) in state.chunks_exact_mut(v).enumerate() {
        let factor = exp(decay[d]);
        row.iter_mut()
            .for_each(|value| *value = normal(*value * factor));
        for (i, write) in write.chunks_exact(v).enumerate() {
            add_scaled(row, decayed[i * k + d], write);
        }
    }
}

/// `A_kk[i][j] = beta_i sum_d k_id k_jd exp(G_id - G_jd)` below the diagonal, and `A_qk` likewise with queries, without beta
/// and with the diagonal.
#[inline(always)]
fn scores(tokens: &Tokens<'_>, scratch: &mut Scratch) -> (Square, Square) {
    let (k, c) = (tokens.key_width, tokens.length());
    let (mut a_kk, mut a_qk) = ([[0.0; CHUNK]; CHUNK], [[0.0; CHUNK]; CHUNK]);
    for i in 0..c {
        a_qk[i][i] = dot(
            &tokens.query[i * k..(i + 1) * k],
            &tokens.key[i * k..(i + 1) * k],
        );
    }
    let Scratch {
        decayed,
        decayed_query,
        decay,
        ..
    } = scratch;
    for half in [8, 4, 2, 1] {
        for anchor in (half..c).step_by(2 * half) {
            let (columns, rows) = (anchor - half..anchor, anchor..c.min(anchor + half));
            // Columns decay from the position after them up to the anchor, summed outwards from it.
            decay.fill(0.0);
            for j in columns.clone().rev() {
                for d in 0..k {
                    decayed[j * k + d] = normal(tokens.key[j * k + d] * exp(decay[d]));
                    decay[d] += tokens.gates[j * k + d];
                }
            }
            // Rows decay from the anchor to their own position, inclusive.
            decay.fill(0.0);
            for i in rows {
                for d in 0..k {
                    decay[d] += tokens.gates[i * k + d];
                    let factor = exp(decay[d]);
                    decayed[i * k + d] = normal(tokens.key[i * k + d] * factor);
                    decayed_query[i * k + d] = normal(tokens.query[i * k + d] * factor);
                }
                for j in columns.clone() {
                    let column = &decayed[j * k..(j + 1) * k];
                    a_kk[i][j] = tokens.beta[i] * dot(&decayed[i * k..(i + 1) * k], column);
                    a_qk[i][j] = dot(&decayed_query[i * k..(i + 1) * k], column);
                }
            }
        }
    }
    (a_kk, a_qk)
}
