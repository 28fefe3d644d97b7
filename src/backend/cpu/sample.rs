//! Draws tokens from rows of logits. [`Draw`] defines what is drawn; from the logits on, everything is integer arithmetic.

use rayon::prelude::*;

use super::math::vectorised;
use crate::backend::draw::{DrawNumbers, FARTHEST, share_of, weight};
use crate::backend::{Draw, Drawn};

/// Logits that a thread sums together.
const SLICE: usize = 4096;

/// One result per draw from `logits` `[O, vocabulary]`; `None` for a draw that allows no token.
pub(super) fn sample(logits: &[f32], vocabulary: usize, draws: &[Draw]) -> Vec<Option<Drawn>> {
    let draws = draws.par_iter().map(|draw| {
        let row = &logits[draw.output * vocabulary..(draw.output + 1) * vocabulary];
        let token = token(row, draw)?;
        Some(Drawn {
            token: token as u32,
            logit: row[token],
        })
    });
    draws.collect()
}

/// Keeps a draw for the next submission: `[token, bits of its logit]`.
pub(super) fn keep(draw: Option<Drawn>, row: &mut [u32]) {
    let kept = draw.map_or([u32::MAX, 0], |draw| [draw.token, draw.logit.to_bits()]);
    row.copy_from_slice(&kept);
}

/// An integer in the total order of all floats.
#[inline(always)]
fn order_key(logit: f32) -> u32 {
    let bits = logit.to_bits();
    bits ^ if bits >> 31 == 1 { u32::MAX } else { 1 << 31 }
}

/// The float of a key.
#[inline(always)]
fn logit_of(key: u32) -> f32 {
    f32::from_bits(key ^ if key >> 31 == 1 { 1 << 31 } else { u32::MAX })
}

fn token(row: &[f32], draw: &Draw) -> Option<usize> {
    let mut keys = keys(row, draw);
    let greatest = vectorised(
        #[inline(always)]
        || keys.iter().copied().fold(0, u32::max),
    );
    if greatest == 0 {
        return None;
    }
    let best = keys.iter().position(|key| *key == greatest)?;
    let numbers = draw.numbers();
    if numbers.scale == 0.0 {
        return Some(best);
    }
    let weights = Weights {
        greatest: logit_of(greatest),
        numbers,
    };
    weights.cut(&mut keys);
    let sums: Vec<u64> = keys
        .par_chunks(SLICE)
        .map(|keys| weights.sum(keys))
        .collect();
    let mut left = share_of(sums.iter().sum(), draw.random);
    let mut reached = |weight: u64| {
        let here = left < weight;
        left -= if here { 0 } else { weight };
        here
    };
    // Without any weight, which only a row that is not finite has, the best token.
    let Some(slice) = sums.iter().position(|sum| reached(*sum)) else {
        return Some(best);
    };
    let mut of_slice = keys[slice * SLICE..].iter();
    let found = of_slice.position(|key| reached(u64::from(weights.of(*key))));
    Some(found.map_or(best, |found| slice * SLICE + found))
}

/// Each token's key after the draw's changes; 0, which no number has, for a token that is removed.
fn keys(row: &[f32], draw: &Draw) -> Vec<u32> {
    let mut keys = vec![0; row.len()];
    vectorised(
        #[inline(always)]
        || {
            for (key, logit) in keys.iter_mut().zip(row) {
                *key = order_key(*logit);
            }
        },
    );
    for change in draw.changes.iter() {
        let token = change.token as usize;
        keys[token] = order_key(change.apply(row[token]));
    }
    if let Some(allowed) = &draw.allowed {
        for (keys, bits) in keys.chunks_mut(32).zip(allowed.iter()) {
            if *bits != u32::MAX {
                for (i, key) in keys.iter_mut().enumerate() {
                    *key = if bits >> i & 1 == 1 { *key } else { 0 };
                }
            }
        }
    }
    keys
}

/// The weights of one row's tokens.
struct Weights {
    greatest: f32,
    numbers: DrawNumbers,
}

impl Weights {
    /// The weight of a token, 0 if it is removed or below the least one.
    #[inline(always)]
    fn of(&self, key: u32) -> u32 {
        let distance = (self.greatest - logit_of(key)) * self.numbers.scale;
        let near = key != 0 && distance < FARTHEST;
        let found = weight(if near { distance as u32 } else { 0 });
        if near && found >= self.numbers.least {
            found
        } else {
            0
        }
    }

    fn sum(&self, keys: &[u32]) -> u64 {
        vectorised(
            #[inline(always)]
            || keys.iter().map(|key| u64::from(self.of(*key))).sum(),
        )
    }

    /// Removes the tokens that `top_k` and `top_p` do not keep.
    fn cut(&self, keys: &mut [u32]) {
        let DrawNumbers { top_k, top_p, .. } = self.numbers;
        let mut most = None;
        if top_k > 0 {
            let all = keys.iter().copied().filter(|key| *key > 0);
            most = narrow(all.collect(), |_| 1, |_| u64::from(top_k));
        }
        if top_p > 0 {
            // Weights below the least one count here: the share is of all tokens that top_k keeps.
            let every = DrawNumbers {
                least: 0,
                ..self.numbers
            };
            let weights = Weights {
                numbers: every,
                ..*self
            };
            let weight = |key| u64::from(weights.of(key));
            let (last, ties) = most.unwrap_or((0, 0));
            let mut kept: Vec<u32> = keys.iter().copied().filter(|key| *key > last).collect();
            kept.extend(std::iter::repeat_n(last, ties as usize));
            let share = narrow(kept, weight, |total| share_of(total, top_p).max(1));
            most = share.map(|(key, left)| (key, left.div_ceil(weight(key).max(1))));
        }
        let Some((last, mut ties)) = most else {
            return;
        };
        for key in keys {
            let tie = *key == last;
            if *key < last || (tie && ties == 0) {
                *key = 0;
            } else if tie {
                ties -= 1;
            }
        }
    }
}

/// The key at which the amounts of the greatest keys reach a goal, which follows from the sum of all amounts, and how much of
/// the goal greater keys leave; `None` if the sum is less.
fn narrow(
    mut keys: Vec<u32>,
    amount: impl Fn(u32) -> u64,
    goal: impl FnOnce(u64) -> u64,
) -> Option<(u32, u64)> {
    let mut goal = Some(goal);
    let mut left = 0;
    for shift in [24, 16, 8, 0] {
        let digit = |key: u32| (key >> shift) as usize % 256;
        let mut cells = [0; 256];
        for key in &keys {
            cells[digit(*key)] += amount(*key);
        }
        if let Some(goal) = goal.take() {
            left = goal(cells.iter().sum());
        }
        let reached = (0..cells.len()).rev().find(|at| {
            let here = left <= cells[*at];
            left -= if here { 0 } else { cells[*at] };
            here
        })?;
        keys.retain(|key| digit(*key) == reached);
    }
    keys.first().map(|key| (*key, left))
}
