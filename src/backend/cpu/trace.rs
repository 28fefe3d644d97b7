//! The numbers of a trace: reductions over a state and its next write, over a gate, over a head's attention.
//!
//! Sums run in double precision: they are few, and what is shown of a state should not depend on their order.

use super::kda_recurrence::Rows;
use super::math::vectorised;
use super::memory::{CpuWeight, Latents, States};
use super::mla_decode::Shape;
use crate::backend::trace::KDA_NUMBERS;
use crate::backend::{KEY_EPS, Piece, StateLayout};

/// One single token through all heads: `output` `[H * KDA_NUMBERS]`.
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
    for (head, output) in output.chunks_exact_mut(KDA_NUMBERS).enumerate() {
        let key_head = head / (layout.value_heads / layout.key_heads);
        let key = &rows.qkv[(layout.key_heads + key_head) * k..][..k];
        let value = &rows.qkv[2 * layout.key_heads * k + head * v..][..v];
        let (gates, beta) = (&rows.gates[head * k..][..k], f64::from(rows.beta[head]));
        let square = |values: &[f32]| values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
        let norm = (square(key) + f64::from(KEY_EPS)).sqrt();
        let key: Vec<f64> = key.iter().map(|x| f64::from(*x) / norm).collect();
        let decay: Vec<f64> = gates.iter().map(|gate| f64::from(*gate).exp()).collect();
        let state = before.map(|state| &state[head * k * v..][..k * v]);
        let mut error: Vec<f64> = value.iter().map(|value| f64::from(*value)).collect();
        let mut after = 0.0;
        // Row by row, as the state lies in memory: this runs beside every token that is traced.
        vectorised(
            #[inline(always)]
            || {
                for (d, row) in state
                    .iter()
                    .flat_map(|state| state.chunks_exact(v))
                    .enumerate()
                {
                    let read = key[d] * decay[d];
                    for (error, s) in error.iter_mut().zip(row) {
                        *error -= read * f64::from(*s);
                    }
                }
                let mut squares = vec![0.0; v];
                for d in 0..k {
                    let (decay, write) = (decay[d], key[d] * beta);
                    match state {
                        Some(state) => {
                            let row = &state[d * v..(d + 1) * v];
                            for ((sum, s), error) in squares.iter_mut().zip(row).zip(&error) {
                                let new = decay * f64::from(*s) + write * error;
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
                after = squares.iter().sum();
            },
        );
        let length = |values: &[f64]| values.iter().map(|x| x * x).sum::<f64>().sqrt();
        let numbers = [
            f64::sqrt(after),
            length(&key) * beta * length(&error),
            length(&error),
            decay.iter().sum::<f64>() / k as f64,
            beta,
        ];
        output
            .iter_mut()
            .zip(numbers)
            .for_each(|(output, number)| *output = number as f32);
    }
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
    let scores: Vec<f64> = (0..positions).map(score).collect();
    let greatest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().map(|score| (score - greatest).exp()).sum();
    output.fill(0.0);
    for (output, score) in output.iter_mut().zip(&scores) {
        *output = ((score - greatest).exp() / sum) as f32;
    }
}
