//! The next token of a row: its best candidates, its log-normaliser, and whether all logits are finite.

use rayon::prelude::*;

use crate::backend::{Choice, OutputRow};

/// One [`Choice`] per row of `logits` `[O, vocabulary]`.
pub(super) fn select(
    logits: &[f32],
    vocabulary: usize,
    candidates: usize,
    rows: &[OutputRow],
) -> Vec<Choice> {
    logits
        .par_chunks_exact(vocabulary)
        .zip(rows)
        .map(|(logits, row)| choose(logits, candidates, row.target))
        .collect()
}

fn choose(logits: &[f32], candidates: usize, target: Option<u32>) -> Choice {
    let finite = logits.iter().all(|logit| logit.is_finite());
    let greatest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits
        .iter()
        .map(|logit| f64::from(logit - greatest).exp())
        .sum();
    // For equal logits the lower id comes first.
    let better = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    let mut best: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
    let candidates = candidates.min(best.len());
    if candidates < best.len() {
        best.select_nth_unstable_by(candidates, better);
        best.truncate(candidates);
    }
    best.sort_unstable_by(better);
    Choice {
        candidates: best,
        log_normaliser: (f64::from(greatest) + sum.ln()) as f32,
        target_logit: target.map(|target| logits[target as usize]),
        finite,
    }
}
