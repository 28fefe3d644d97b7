//! Latent attention for many queries: keys and values are expanded from the latents, some positions at a time.
//!
//! Softmax runs online (Milakov and Gimelshein, arXiv 1805.02867) over runs of positions counted from the sequence's start,
//! so a row's arithmetic depends on its position alone, not on how the prompt was cut.

use rayon::prelude::*;

use super::latents::Latents;
use super::math::{products, vectorised};
use super::memory::CpuWeight;
use super::mla::{Shape, absorb};
use crate::backend::Segment;

/// Positions that are expanded together.
const RUN: usize = 64;

/// One segment: `query` `[length, H * (nope + rope)]` to `output` `[length, H * value]`.
pub(super) fn mla_prefill(
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
            let mut queries = Vec::with_capacity(segment.length * shape.key());
            for row in query.chunks_exact(heads * shape.key()) {
                queries.extend_from_slice(&row[head * shape.key()..(head + 1) * shape.key()]);
            }
            attend(
                &queries,
                &shape.whole_expansion(kv_b, head),
                shape,
                latents,
                layer,
                segment,
            )
        })
        .collect();
    output
        .par_chunks_exact_mut(heads * value)
        .enumerate()
        .for_each(|(t, output)| {
            for (output, result) in output.chunks_exact_mut(value).zip(&results) {
                output.copy_from_slice(&result[t * value..(t + 1) * value]);
            }
        });
}

/// One head: `[length, value]`.
fn attend(
    queries: &[f32],
    expansion: &[f32],
    shape: &Shape,
    latents: &Latents,
    layer: usize,
    segment: &Segment,
) -> Vec<f32> {
    let (key, value, length) = (shape.key(), shape.value, segment.length);
    let mut output = vec![0.0; length * value];
    // Per row: the greatest score so far and the sum of exponentials.
    let mut softmax = vec![(f32::NEG_INFINITY, 0.0_f32); length];
    let (mut rows, mut rope, mut wide) = (Vec::new(), Vec::new(), Vec::new());
    let end = segment.position + length;
    for first in (0..end).step_by(RUN) {
        let run = RUN.min(end - first);
        rows.clear();
        rope.clear();
        for position in first..first + run {
            let (latent, shared) = latents
                .row(layer, &segment.blocks, position, &mut wide)
                .split_at(shape.latent);
            rows.extend_from_slice(latent);
            rope.extend_from_slice(shared);
        }
        // [nope + value, run], then keys as rows [run, nope | rope].
        let mut expanded = vec![0.0; (shape.nope + value) * run];
        products(shape.latent, &rows, expansion, &mut expanded);
        let (nope, values) = expanded.split_at(shape.nope * run);
        let mut keys = Vec::with_capacity(run * key);
        let mut value_rows = Vec::with_capacity(run * value);
        for j in 0..run {
            keys.extend((0..shape.nope).map(|d| nope[d * run + j]));
            keys.extend_from_slice(&rope[j * shape.rope..(j + 1) * shape.rope]);
            value_rows.extend((0..value).map(|d| values[d * run + j]));
        }
        let from = first.saturating_sub(segment.position);
        let mut scores = vec![0.0; (length - from) * run];
        products(key, &keys, &queries[from * key..], &mut scores);
        for (t, scores) in (from..length).zip(scores.chunks_exact_mut(run)) {
            let seen = run.min(segment.position + t + 1 - first);
            let row = &mut output[t * value..(t + 1) * value];
            vectorised(
                #[inline(always)]
                || {
                    absorb(
                        &mut scores[..seen],
                        shape.scale(),
                        &value_rows,
                        row,
                        &mut softmax[t],
                    )
                },
            );
        }
    }
    for (row, (_, sum)) in output.chunks_exact_mut(value).zip(softmax) {
        row.iter_mut().for_each(|value| *value /= sum);
    }
    output
}
