//! The numbers of a trace: reductions over a state and its next write, over a gate, over a head's attention.
//!
//! Heads run side by side, as in the recurrence: this runs beside every token that is traced. A sum of few numbers runs in
//! double precision, so that what is shown does not depend on its order; those over a state run in the state's own.

use rayon::prelude::*;

use super::kda_recurrence::Rows;
use super::math::vectorised;
use super::memory::{CpuWeight, Latents, States};
use super::mla_decode::Shape;
use crate::backend::trace::{KDA_NUMBERS, kda_record};
use crate::backend::{KEY_EPS, Piece, StateLayout};

/// Elements that are not worth another thread: it takes longer to wake.
const TASK: usize = 1 << 16;

/// One single token through all heads: `output` `[H * kda_record]`.
pub(super) fn trace_kda(
    rows: &Rows<'_>,
    states: &States,
    layout: &StateLayout,
    layer: usize,
    piece: &Piece,
    output: &mut [f32],
) {
    let (k, v) = (layout.key_width, layout.value_width);
    let before = piece.slot_in.map(|slot| states.state(layer, slot));
    let records = output.par_chunks_exact_mut(kda_record(layout)).enumerate();
    let records = records.with_min_len(TASK / (k * v).max(1) + 1);
    records.for_each(|(head, record)| {
        let key_head = head / (layout.value_heads / layout.key_heads);
        let key = &rows.qkv[(layout.key_heads + key_head) * k..][..k];
        let value = &rows.qkv[2 * layout.key_heads * k + head * v..][..v];
        let (gates, beta) = (&rows.gates[head * k..][..k], rows.beta[head]);
        let state = before.map(|state| &state[head * k * v..][..k * v]);
        let (numbers, decays) = record.split_at_mut(KDA_NUMBERS);
        decays.copy_from_slice(gates);
        numbers.copy_from_slice(&numbers_of(key, value, gates, beta, state));
    });
}

/// The numbers of one head: `key` and `gates` `[K]`, `value` `[V]`, `state` `[K, V]` before the token.
fn numbers_of(
    key: &[f32],
    value: &[f32],
    gates: &[f32],
    beta: f32,
    state: Option<&[f32]>,
) -> [f32; KDA_NUMBERS] {
    let square = |values: &[f32]| values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
    let norm = (square(key) + f64::from(KEY_EPS)).sqrt();
    let key: Vec<f32> = key.iter().map(|x| (f64::from(*x) / norm) as f32).collect();
    let decay: Vec<f32> = gates.iter().map(|gate| gate.exp()).collect();
    let v = value.len();
    let mut error = value.to_vec();
    let mut squares = vec![0.0_f32; v];
    // Row by row, as the state lies in memory.
    vectorised(
        #[inline(always)]
        || {
            let rows = state.into_iter().flat_map(|state| state.chunks_exact(v));
            for ((row, key), decay) in rows.zip(&key).zip(&decay) {
                let read = key * decay;
                for (error, s) in error.iter_mut().zip(row) {
                    *error -= read * s;
                }
            }
            for (d, (key, decay)) in key.iter().zip(&decay).enumerate() {
                let write = key * beta;
                match state {
                    Some(state) => {
                        let row = &state[d * v..(d + 1) * v];
                        for ((sum, s), error) in squares.iter_mut().zip(row).zip(&error) {
                            let new = decay * s + write * error;
                            *sum += new * new;
                        }
                    }
                    None => {
                        for (sum, error) in squares.iter_mut().zip(&error) {
                            *sum += (write * error) * (write * error);
                        }
                    }
                }
            }
        },
    );
    let after: f64 = squares.iter().map(|square| f64::from(*square)).sum();
    let wrong = square(&error).sqrt();
    let kept: f64 = decay.iter().map(|decay| f64::from(*decay)).sum();
    [
        after.sqrt() as f32,
        (square(&key).sqrt() * f64::from(beta) * wrong) as f32,
        wrong as f32,
        (kept / key.len() as f64) as f32,
        beta,
    ]
}

/// The mean of `sigmoid(gate)` a head: `gate` `[H * V]`, `output` `[H]`.
pub(super) fn trace_gate(gate: &[f32], output: &mut [f32]) {
    let width = gate.len() / output.len().max(1);
    for (output, gate) in output.iter_mut().zip(gate.chunks_exact(width.max(1))) {
        let sum: f64 = gate
            .iter()
            .map(|gate| 1.0 / (1.0 + (-f64::from(*gate)).exp()))
            .sum();
        *output = (sum / width as f64) as f32;
    }
}

/// The experts of one token and their weights, `[top]` each: `output` `[2 * top]`.
pub(super) fn trace_route(experts: &[u32], weights: &[f32], output: &mut [f32]) {
    let (numbers, chosen) = output.split_at_mut(output.len() / 2);
    for (number, expert) in numbers.iter_mut().zip(experts) {
        *number = *expert as f32;
    }
    chosen.copy_from_slice(&weights[..chosen.len()]);
}

/// The weights of one head over the positions up to a single token's own: `query` is that head's, `output` has a place for
/// each position.
pub(super) fn trace_attention(
    query: &[f32],
    kv_b: &CpuWeight,
    shape: &Shape,
    head: usize,
    latents: &Latents,
    layer: usize,
    piece: &Piece,
    output: &mut [f32],
) {
    let expansion = shape.expansion(kv_b, head);
    let mut absorbed = vec![0.0_f64; shape.latent];
    for (query, row) in query
        .iter()
        .zip(expansion.chunks_exact(shape.latent).take(shape.nope))
    {
        absorbed
            .iter_mut()
            .zip(row)
            .for_each(|(sum, weight)| *sum += f64::from(query * weight));
    }
    absorbed.extend(query[shape.nope..].iter().map(|query| f64::from(*query)));
    let positions = (piece.position + 1).min(output.len());
    let score = |position: usize| -> f64 {
        let row = latents.row(layer, &piece.blocks, position);
        let dot: f64 = row
            .iter()
            .zip(&absorbed)
            .map(|(row, query)| f64::from(*row) * query)
            .sum();
        dot * f64::from(shape.scale())
    };
    let scores: Vec<f64> = (0..positions)
        .into_par_iter()
        .with_min_len(TASK / absorbed.len() + 1)
        .map(score)
        .collect();
    let greatest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().map(|score| (score - greatest).exp()).sum();
    output.fill(0.0);
    for (output, score) in output.iter_mut().zip(&scores) {
        *output = ((score - greatest).exp() / sum) as f32;
    }
}
