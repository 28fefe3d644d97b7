//! What latent attention for few queries and for many have in common: widths, and an online softmax over runs of positions.

use super::math::add_scaled;
use super::memory::CpuWeight;
use crate::backend::LatentLayout;

/// Widths of one latent attention.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) heads: usize,
    pub(super) latent: usize,
    pub(super) nope: usize,
    pub(super) rope: usize,
    pub(super) value: usize,
}

impl Shape {
    /// The widths for `heads` heads over a pool of this layout.
    pub(super) fn new(layout: &LatentLayout, heads: usize, nope: usize, value: usize) -> Self {
        Self {
            heads,
            latent: layout.latent,
            nope,
            rope: layout.rope,
            value,
        }
    }

    /// Width of a key.
    pub(super) fn key(&self) -> usize {
        self.nope + self.rope
    }

    /// The factor of the scores.
    pub(super) fn scale(&self) -> f32 {
        (self.key() as f32).sqrt().recip()
    }

    /// Widens one head's rows of kv_b_proj from `first` on, as many as fit in `rows`: `[.., latent]`. A head has `nope` rows
    /// for keys, then `value` for values.
    pub(super) fn expansion(&self, kv_b: &CpuWeight, head: usize, first: usize, rows: &mut [f32]) {
        let first = head * (self.nope + self.value) + first;
        for (i, row) in rows.chunks_exact_mut(self.latent).enumerate() {
            kv_b.row(first + i, row);
        }
    }

    /// All rows of one head: `[nope + value, latent]`.
    pub(super) fn whole_expansion(&self, kv_b: &CpuWeight, head: usize) -> Vec<f32> {
        let mut rows = vec![0.0; (self.nope + self.value) * self.latent];
        self.expansion(kv_b, head, 0, &mut rows);
        rows
    }
}

/// Adds one run of scores to an online softmax: `output` `[value]`, `values` `[run, value]`.
#[inline(always)]
pub(super) fn absorb(
    scores: &mut [f32],
    scale: f32,
    values: &[f32],
    output: &mut [f32],
    (greatest, sum): &mut (f32, f32),
) {
    let mut best = *greatest;
    for score in scores.iter_mut() {
        *score *= scale;
        best = best.max(*score);
    }
    let keep = (*greatest - best).exp();
    *greatest = best;
    *sum *= keep;
    output.iter_mut().for_each(|value| *value *= keep);
    for (score, value) in scores.iter().zip(values.chunks_exact(output.len())) {
        let weight = (score - best).exp();
        *sum += weight;
        add_scaled(output, weight, value);
    }
}
