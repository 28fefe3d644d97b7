//! Samples of a kernel's expected results in f64, from the numbers that the device was asked to generate.
//!
//! At the published sizes a whole result takes too long on a CPU: a few rows, heads and columns are computed.

use half::bf16;
use rayon::prelude::*;

use crate::backend::{LatentPool, Random};
use crate::config::{Dtype, ModelConfig};
use crate::conformance::oracle::Recurrence;

/// Element `i` of a weight in bf16.
fn weight(random: &Random, i: usize) -> f64 {
    f64::from(bf16::from_f32(random.value(i as u64)).to_f32())
}

/// Row `row` of a matrix with `columns` columns, times `input` `[columns]`.
pub(super) fn product(random: &Random, columns: usize, row: usize, input: &[f32]) -> f64 {
    let inputs = input.iter().enumerate();
    inputs
        .map(|(i, x)| weight(random, row * columns + i) * f64::from(*x))
        .sum()
}

/// The experts `ids` of one row: `sum_e w_e down_e(silu(gate_e x) * up_e x)`, from stacks of `[n, d]`, `[n, d]`, `[d, n]`.
pub(super) fn experts(
    [gate, up, down]: [&Random; 3],
    [n, d]: [usize; 2],
    ids: &[u32],
    weights: &[f32],
    input: &[f32],
) -> Vec<f64> {
    let mut output = vec![0.0; d];
    for (expert, share) in ids.iter().zip(weights) {
        let first = *expert as usize;
        let hidden: Vec<f64> = (0..n)
            .into_par_iter()
            .map(|row| {
                let gate = product(gate, d, first * n + row, input);
                let up = product(up, d, first * n + row, input);
                gate / (1.0 + (-gate).exp()) * up
            })
            .collect();
        output.par_iter_mut().enumerate().for_each(|(row, sum)| {
            let row = (first * d + row) * n;
            let terms = hidden.iter().enumerate();
            let dot: f64 = terms.map(|(i, x)| weight(down, row + i) * x).sum();
            *sum += f64::from(*share) * dot;
        });
    }
    output
}

/// Latent attention of one head of one query, in the absorbed form, over the first `count` rows of sequence `sequence` in a pool
/// filled with `latents`: the blocks of a sequence are contiguous.
pub(super) struct Attention<'a> {
    pub(super) config: &'a ModelConfig,
    pub(super) pool: LatentPool,
    pub(super) layer: usize,
    pub(super) latents: Random,
    pub(super) kv_b: Random,
}

impl Attention<'_> {
    /// The head's value `[value]`. `query` is the head's `[nope + rope]`; `first` is the sequence's first block.
    pub(super) fn head(&self, head: usize, query: &[f32], first: usize, count: usize) -> Vec<f64> {
        let config = self.config;
        let (latent, nope, value) = (
            config.kv_lora_rank,
            config.qk_nope_head_dim,
            config.v_head_dim,
        );
        let layout = self.pool.layout;
        let width = layout.width();
        let rows = head * (nope + value);
        // W_UK^T q, and the shared part unchanged.
        let mut absorbed = vec![0.0; width];
        for (d, q) in query[..nope].iter().enumerate() {
            for (c, sum) in absorbed[..latent].iter_mut().enumerate() {
                *sum += f64::from(*q) * weight(&self.kv_b, (rows + d) * latent + c);
            }
        }
        for (sum, q) in absorbed[latent..].iter_mut().zip(&query[nope..]) {
            *sum = f64::from(*q);
        }
        let random = self.latents.part(self.layer);
        let cached = |i: usize| match layout.dtype {
            Dtype::F32 => f64::from(random.value(i as u64)),
            _ => weight(&random, i),
        };
        let scale = (query.len() as f64).powf(-0.5);
        // For each range of positions: its greatest score, the sum of its weights, its weighted rows.
        let runs: Vec<(f64, f64, Vec<f64>)> = (0..count)
            .collect::<Vec<_>>()
            .par_chunks(1024)
            .map(|positions| {
                let (mut most, mut sum) = (f64::NEG_INFINITY, 0.0);
                let mut context = vec![0.0; latent];
                let mut row = vec![0.0; width];
                for position in positions {
                    let start = (first * layout.block_tokens + position) * width;
                    for (c, x) in row.iter_mut().enumerate() {
                        *x = cached(start + c);
                    }
                    let dot: f64 = row.iter().zip(&absorbed).map(|(x, q)| x * q).sum();
                    let score = dot * scale;
                    if score > most {
                        let shrink = (most - score).exp();
                        sum *= shrink;
                        context.iter_mut().for_each(|x| *x *= shrink);
                        most = score;
                    }
                    let share = (score - most).exp();
                    sum += share;
                    for (context, x) in context.iter_mut().zip(&row) {
                        *context += share * x;
                    }
                }
                (most, sum, context)
            })
            .collect();
        let most = runs
            .iter()
            .map(|run| run.0)
            .fold(f64::NEG_INFINITY, f64::max);
        let mut sum = 0.0;
        let mut context = vec![0.0; latent];
        for (own, own_sum, own_context) in runs {
            let shrink = (own - most).exp();
            sum += shrink * own_sum;
            for (context, x) in context.iter_mut().zip(own_context) {
                *context += shrink * x;
            }
        }
        (0..value)
            .map(|d| {
                let row = (rows + nope + d) * latent;
                let terms = context.iter().enumerate();
                terms
                    .map(|(c, x)| weight(&self.kv_b, row + c) * x / sum)
                    .sum()
            })
            .collect()
    }
}

/// Inputs of a recurrence over sequences laid end to end.
pub(super) struct Inputs<'a> {
    pub(super) heads: usize,
    pub(super) width: usize,
    pub(super) lengths: &'a [usize],
    /// `[T, 3 * heads * width]`.
    pub(super) qkv: &'a [f32],
    /// `[T, heads * width]`.
    pub(super) gates: &'a [f32],
    /// `[T, heads]`.
    pub(super) beta: &'a [f32],
    /// `[sequences, heads, K, V]`; `None` if sequences start from a zero state.
    pub(super) initial: Option<&'a [f32]>,
}

/// The recurrence of some heads: outputs `[T, V]` and final states `[sequences, K, V]` of each head.
pub(super) fn recurrence(inputs: &Inputs<'_>, heads: &[usize]) -> Vec<(Vec<f64>, Vec<f64>)> {
    let (all, width) = (inputs.heads, inputs.width);
    let one = |head: &usize| {
        let wide = |x: &[f32]| -> Vec<f64> { x.iter().map(|x| f64::from(*x)).collect() };
        let (mut outputs, mut states) = (Vec::new(), Vec::new());
        let mut t = 0;
        for (sequence, length) in inputs.lengths.iter().enumerate() {
            let len = width * width;
            let start = (sequence * all + head) * len;
            let state = inputs.initial.map_or_else(
                || vec![0.0; len],
                |states| wide(&states[start..start + len]),
            );
            let mut recurrence = Recurrence {
                key_heads: 1,
                value_heads: 1,
                key_width: width,
                value_width: width,
                state,
            };
            for _ in 0..*length {
                let mut row = Vec::with_capacity(3 * width);
                for part in 0..3 {
                    let start = (t * 3 + part) * all * width + head * width;
                    row.extend(wide(&inputs.qkv[start..start + width]));
                }
                let start = (t * all + head) * width;
                let gates = wide(&inputs.gates[start..start + width]);
                let beta = [f64::from(inputs.beta[t * all + head])];
                outputs.extend(recurrence.token(&row, &gates, &beta));
                t += 1;
            }
            states.extend(recurrence.state);
        }
        (outputs, states)
    };
    heads.par_iter().map(one).collect()
}
