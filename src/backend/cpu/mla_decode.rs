//! Latent attention for few queries: the expansion is absorbed into query and output (DeepSeek-V2, arXiv 2405.04434,
//! section 2.1.2), so that each cached row is read once and never expanded.

use rayon::prelude::*;

use super::latents::Latents;
use super::math::{add_scaled, dot, products, vectorised};
use super::memory::CpuWeight;
use super::mla::{Shape, absorb};
use crate::backend::Segment;

/// Positions whose scores are taken together.
const RUN: usize = 64;

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
            let expansion = shape.expansion(kv_b, head);
            let mut result = vec![0.0; segment.length * value];
            for (t, result) in result.chunks_exact_mut(value).enumerate() {
                let query =
                    &query[(t * heads + head) * shape.key()..(t * heads + head + 1) * shape.key()];
                let positions = segment.position + t + 1;
                vectorised(
                    #[inline(always)]
                    || {
                        attend(
                            query, &expansion, shape, latents, layer, segment, positions, result,
                        )
                    },
                );
            }
            result
        })
        .collect();
    for (t, output) in output.chunks_exact_mut(heads * value).enumerate() {
        for (output, result) in output.chunks_exact_mut(value).zip(&results) {
            output.copy_from_slice(&result[t * value..(t + 1) * value]);
        }
    }
}

/// One query of one head over the first `positions` latents: `[value]`.
#[inline(always)]
fn attend(
    query: &[f32],
    expansion: &[f32],
    shape: &Shape,
    latents: &Latents,
    layer: usize,
    segment: &Segment,
    positions: usize,
    output: &mut [f32],
) {
    let (key_rows, value_rows) = expansion.split_at(shape.nope * shape.latent);
    // q_lat = W_UK^T q_nope, and beside it the part of the query that meets k_pe.
    let mut absorbed = vec![0.0; shape.latent];
    for (query, row) in query.iter().zip(key_rows.chunks_exact(shape.latent)) {
        add_scaled(&mut absorbed, *query, row);
    }
    absorbed.extend_from_slice(&query[shape.nope..]);
    let mut context = vec![0.0; shape.latent];
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
            scores.push(dot(row, &absorbed));
            rows.extend_from_slice(&row[..shape.latent]);
        }
        absorb(
            &mut scores,
            shape.scale(),
            &rows,
            &mut context,
            &mut softmax,
        );
    }
    context.iter_mut().for_each(|value| *value /= softmax.1);
    products(shape.latent, &context, value_rows, output);
}
