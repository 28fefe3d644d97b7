//! Latent attention for few queries: the expansion is absorbed into query and output (DeepSeek-V2, arXiv 2405.04434,
//! section 2.1.2), so that each cached row is read once and never expanded.

use rayon::prelude::*;

use super::latents::Latents;
use super::math::{add_scaled, dot, products, vectorised};
use super::memory::CpuWeight;
use super::mla::{Shape, absorb};
use crate::backend::Segment;

/// Positions whose scores are computed together.
const RUN: usize = 64;
/// Rows of the expansion that are widened together, so that they stay in the L1 cache.
const ROWS: usize = 8;

/// One segment: `query` `[length, H * (nope + rope)]` to `output` `[length, H * value]`.
pub(super) fn mla_decode(
    query: &[f32],
    kv_b: &CpuWeight,
    shape: &Shape,
    latents: &Latents,
    layer: usize,
    segment: &Segment,
    output: &mut [f32],
) {
    let (heads, value) = (shape.heads, shape.value);
    let results: Vec<Vec<f32>> = (0..heads)
        .into_par_iter()
        .map(|head| {
            let queries = query.chunks_exact(shape.key()).skip(head).step_by(heads);
            let absorbed = absorbed(queries, kv_b, shape, head, segment.length);
            let mut contexts = vec![0.0; segment.length * shape.latent];
            let rows = absorbed.chunks_exact(shape.latent + shape.rope);
            let each = rows.zip(contexts.chunks_exact_mut(shape.latent));
            for (t, (absorbed, context)) in each.enumerate() {
                let positions = segment.position + t + 1;
                vectorised(
                    #[inline(always)]
                    || attend(absorbed, shape, latents, layer, segment, positions, context),
                );
            }
            values(&contexts, kv_b, shape, head)
        })
        .collect();
    for (t, output) in output.chunks_exact_mut(heads * value).enumerate() {
        for (output, result) in output.chunks_exact_mut(value).zip(&results) {
            output.copy_from_slice(&result[t * value..(t + 1) * value]);
        }
    }
}

/// `q_lat = W_UK^T q_nope` of one head, followed by the part of the query that is multiplied with k_pe:
/// `[length, latent + rope]`.
fn absorbed<'a>(
    queries: impl Iterator<Item = &'a [f32]> + Clone,
    kv_b: &CpuWeight,
    shape: &Shape,
    head: usize,
    length: usize,
) -> Vec<f32> {
    let (latent, width) = (shape.latent, shape.latent + shape.rope);
    let mut absorbed = vec![0.0; length * width];
    let mut widened = vec![0.0; ROWS * latent];
    for first in (0..shape.nope).step_by(ROWS) {
        let rows = &mut widened[..ROWS.min(shape.nope - first) * latent];
        shape.expansion(kv_b, head, first, rows);
        for (query, absorbed) in queries.clone().zip(absorbed.chunks_exact_mut(width)) {
            vectorised(
                #[inline(always)]
                || {
                    for (query, row) in query[first..].iter().zip(rows.chunks_exact(latent)) {
                        add_scaled(&mut absorbed[..latent], *query, row);
                    }
                },
            );
        }
    }
    for (query, absorbed) in queries.zip(absorbed.chunks_exact_mut(width)) {
        absorbed[latent..].copy_from_slice(&query[shape.nope..]);
    }
    absorbed
}

/// `W_UV context` of one head: `[length, latent] -> [length, value]`.
fn values(contexts: &[f32], kv_b: &CpuWeight, shape: &Shape, head: usize) -> Vec<f32> {
    let (latent, value) = (shape.latent, shape.value);
    let mut results = vec![0.0; contexts.len() / latent * value];
    let mut widened = vec![0.0; ROWS * latent];
    for first in (0..value).step_by(ROWS) {
        let count = ROWS.min(value - first);
        let rows = &mut widened[..count * latent];
        shape.expansion(kv_b, head, shape.nope + first, rows);
        let each = contexts.chunks_exact(latent);
        for (context, result) in each.zip(results.chunks_exact_mut(value)) {
            products(latent, context, rows, &mut result[first..first + count]);
        }
    }
    results
}

/// One absorbed query's weighted sum of the first `positions` latents: `[latent]`, zeros before.
#[inline(always)]
fn attend(
    absorbed: &[f32],
    shape: &Shape,
    latents: &Latents,
    layer: usize,
    segment: &Segment,
    positions: usize,
    context: &mut [f32],
) {
    let mut softmax = (f32::NEG_INFINITY, 0.0);
    let (mut scores, mut rows, mut wide) = (
        Vec::with_capacity(RUN),
        Vec::with_capacity(RUN * shape.latent),
        Vec::new(),
    );
    for first in (0..positions).step_by(RUN) {
        scores.clear();
        rows.clear();
        for position in first..positions.min(first + RUN) {
            let row = latents.row(layer, &segment.blocks, position, &mut wide);
            scores.push(dot(row, absorbed));
            rows.extend_from_slice(&row[..shape.latent]);
        }
        absorb(&mut scores, shape.scale(), &rows, context, &mut softmax);
    }
    context.iter_mut().for_each(|value| *value /= softmax.1);
}
