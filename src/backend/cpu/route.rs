//! The router (DeepSeek-V3, arXiv 2412.19437, section 2.1.2): sigmoid scores, a bias that affects only the choice, and choice
//! limited to the best groups of experts.

use rayon::prelude::*;

use super::linear::linear;
use super::math::sigmoid;
use super::memory::CpuWeight;
use crate::backend::Route;

/// `input` `[T, d]` to expert ids and weights `[T, top_k]`.
pub(super) fn route(
    input: &[f32],
    weight: &CpuWeight,
    bias: &[f32],
    op: &Route,
    ids: &mut [u32],
    weights: &mut [f32],
) {
    let (experts, top_k) = (bias.len(), op.experts.width);
    let mut scores = vec![0.0; input.len() / weight.columns() * experts];
    linear(input, weight, 0, experts, &mut scores);
    scores
        .par_chunks_exact_mut(experts)
        .zip(
            ids.par_chunks_exact_mut(top_k)
                .zip(weights.par_chunks_exact_mut(top_k)),
        )
        .for_each(|(scores, (ids, weights))| choose(scores, bias, op, ids, weights));
}

/// Routes one token: `scores` contains its logits `[experts]`.
fn choose(scores: &mut [f32], bias: &[f32], op: &Route, ids: &mut [u32], weights: &mut [f32]) {
    scores.iter_mut().for_each(|score| *score = sigmoid(*score));
    let biased: Vec<f32> = scores
        .iter()
        .zip(bias)
        .map(|(score, bias)| score + bias)
        .collect();
    if biased.iter().any(|score| !score.is_finite()) {
        // A damaged expert might never be chosen; with NaN weights the damage is noticed.
        ids.fill(0);
        weights.fill(f32::NAN);
        return;
    }
    // For equal scores the lower id comes first: a stable sort from high to low.
    let descending = |a: &f32, b: &f32| b.total_cmp(a);
    let mut order: Vec<u32> = (0..).take(scores.len()).collect();
    order.sort_by(|a, b| descending(&biased[*a as usize], &biased[*b as usize]));
    if op.top_groups < op.groups {
        let size = scores.len() / op.groups;
        let worth: Vec<f32> = biased
            .chunks_exact(size)
            .map(|group| {
                let mut group = group.to_vec();
                group.sort_by(descending);
                group.iter().take(2).sum()
            })
            .collect();
        let mut groups: Vec<usize> = (0..op.groups).collect();
        groups.sort_by(|a, b| descending(&worth[*a], &worth[*b]));
        let best = &groups[..op.top_groups];
        order.retain(|expert| best.contains(&(*expert as usize / size)));
    }
    for ((id, weight), expert) in ids.iter_mut().zip(weights.iter_mut()).zip(order) {
        (*id, *weight) = (expert, scores[expert as usize]);
    }
    let sum = weights.iter().sum::<f32>() + 1e-20;
    let factor = if op.renormalize {
        op.scale / sum
    } else {
        op.scale
    };
    weights.iter_mut().for_each(|weight| *weight *= factor);
}
