//! The numbers of a trace: reductions over a state and its next write, over a gate, over a head's attention.
//!
//! Heads run in parallel, as in the recurrence, because this is added to every traced token.

use rayon::prelude::*;

use super::kda_recurrence::Rows;
use super::latents::Latents;
use super::math::{add_scaled, dot, exp, sigmoid, vectorised};
use super::memory::{CpuWeight, States};
use super::mla::Shape;
use crate::backend::trace::{KDA_NUMBERS, kda_row};
use crate::backend::{KEY_EPS, Segment, StateLayout};

/// Below this number of elements another thread is slower, because it has to be woken.
const TASK: usize = 1 << 16;

/// One single token, all heads: `output` `[H * kda_row]`.
pub(super) fn trace_kda(
    rows: &Rows<'_>,
    states: &States,
    layout: &StateLayout,
    layer: usize,
    segment: &Segment,
    output: &mut [f32],
) {
    let (k, v) = (layout.key_width, layout.value_width);
    let before = segment.slot_in.map(|slot| states.state(layer, slot));
    let records = output.par_chunks_exact_mut(kda_row(layout)).enumerate();
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
    let v = value.len();
    vectorised(
        #[inline(always)]
        || {
            let norm = (dot(key, key) + KEY_EPS).sqrt();
            let key: Vec<f32> = key.iter().map(|x| x / norm).collect();
            let decay: Vec<f32> = gates.iter().map(|gate| exp(*gate)).collect();
            let mut error = value.to_vec();
            let mut squares = vec![0.0_f32; v];
            // Row by row, in memory order.
            for (d, row) in state.unwrap_or_default().chunks_exact(v).enumerate() {
                add_scaled(&mut error, -(key[d] * decay[d]), row);
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
            let wrong = dot(&error, &error).sqrt();
            [
                squares.iter().sum::<f32>().sqrt(),
                dot(&key, &key).sqrt() * beta * wrong,
                wrong,
                decay.iter().sum::<f32>() / key.len() as f32,
                beta,
            ]
        },
    )
}

/// The mean of `sigmoid(gate)` per head: `gate` `[H * V]`, `output` `[H]`.
pub(super) fn trace_gate(gate: &[f32], output: &mut [f32]) {
    let width = gate.len() / output.len().max(1);
    let heads = output.iter_mut().zip(gate.chunks_exact(width.max(1)));
    vectorised(
        #[inline(always)]
        || {
            for (output, gate) in heads {
                let open: f32 = gate.iter().map(|gate| sigmoid(*gate)).sum();
                *output = open / width as f32;
            }
        },
    );
}

/// The experts of one token and their weights, `[top]` each: `output` `[2 * top]`.
pub(super) fn trace_route(experts: &[u32], weights: &[f32], output: &mut [f32]) {
    let (numbers, chosen) = output.split_at_mut(output.len() / 2);
    for (number, expert) in numbers.iter_mut().zip(experts) {
        *number = *expert as f32;
    }
    chosen.copy_from_slice(&weights[..chosen.len()]);
}

/// The weights of one head over the positions up to a single token's own: `query` is that head's, `output` has an element per
/// position.
pub(super) fn trace_attention(
    query: &[f32],
    kv_b: &CpuWeight,
    shape: &Shape,
    head: usize,
    latents: &Latents,
    layer: usize,
    segment: &Segment,
    output: &mut [f32],
) {
    let expansion = shape.whole_expansion(kv_b, head);
    let key_rows = &expansion[..shape.nope * shape.latent];
    let positions = (segment.position + 1).min(output.len());
    let output = &mut output[..positions];
    let mut absorbed = vec![0.0; shape.latent];
    vectorised(
        #[inline(always)]
        || {
            for (query, row) in query.iter().zip(key_rows.chunks_exact(shape.latent)) {
                add_scaled(&mut absorbed, *query, row);
            }
        },
    );
    absorbed.extend_from_slice(&query[shape.nope..]);
    let run = TASK / absorbed.len().max(1) + 1;
    let runs = output.par_chunks_mut(run).enumerate();
    runs.for_each(|(number, scores)| {
        vectorised(
            #[inline(always)]
            || {
                let mut wide = Vec::new();
                for (i, score) in scores.iter_mut().enumerate() {
                    let position = number * run + i;
                    let row = latents.row(layer, &segment.blocks, position, &mut wide);
                    *score = dot(row, &absorbed) * shape.scale();
                }
            },
        );
    });
    let greatest = output.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    vectorised(
        #[inline(always)]
        || {
            for score in output.iter_mut() {
                *score = exp(*score - greatest);
            }
        },
    );
    // In double precision, because there may be a million of them.
    let sum: f64 = output.iter().map(|chance| f64::from(*chance)).sum();
    output
        .iter_mut()
        .for_each(|chance| *chance = (f64::from(*chance) / sum) as f32);
}
