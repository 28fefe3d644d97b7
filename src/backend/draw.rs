//! Draws of tokens from rows of logits: what a batch says about one, and the numbers that every backend computes it with.
//!
//! From the logits on, a draw is integer arithmetic, so that all backends draw the same token of the same row whatever their
//! order of summation. A token's weight, proportional to its probability, is a fixed-point number: the greatest logit has about
//! 2^31, and a token that is less than 2^-31 times as likely has 0 and is never drawn.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Result;
use crate::error::BackendError;

/// A draw of one token from an output row.
///
/// 1. Each logit in [`Draw::changes`] is changed; tokens that [`Draw::allowed`] leaves out are removed.
/// 2. The others are put in order, greatest logit first (by the total order of f32), of equal ones the lower id first. At
///    temperature 0 the first of them is drawn.
/// 3. Each has a weight `exp((logit - greatest) / temperature)`.
/// 4. The kept ones are a beginning of that order: the first `top_k`; of those the fewest whose weights sum to `top_p` times
///    the weights of all of them; of those the ones whose weight is at least `min_p` times the greatest weight. At least one is
///    kept.
/// 5. In the order of ids, the first kept token at which the sum of weights exceeds `random / 2^32` times the sum of all kept
///    weights is drawn.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Draw {
    /// The row's index in [`Batch::outputs`](super::Batch::outputs). Several draws may have the same row.
    pub output: usize,
    /// Divides the logits; 0 draws the best token.
    pub temperature: f64,
    /// Number of tokens kept; 0 keeps all of them.
    pub top_k: usize,
    /// Share of the probability that is kept, above 0; 1 keeps all of it.
    pub top_p: f64,
    /// Least probability that is kept, relative to the greatest one; 0 keeps all tokens.
    pub min_p: f64,
    /// A uniform random number in units of 2^-32.
    pub random: u32,
    /// The tokens that may be drawn: bit `id % 32` of word `id / 32`; `None` for all of them.
    #[serde(with = "slices::optional")]
    pub allowed: Option<Arc<[u32]>>,
    /// Changed logits, ascending by token.
    #[serde(with = "slices")]
    pub changes: Arc<[LogitChange]>,
}

/// Shared slices as sequences, for processes that do not share them.
mod slices {
    use std::sync::Arc;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<T: Serialize, S: Serializer>(
        slice: &Arc<[T]>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        slice[..].serialize(to)
    }

    pub(super) fn deserialize<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Arc<[T]>, D::Error> {
        Vec::deserialize(from).map(Arc::from)
    }

    pub(super) mod optional {
        use super::{Arc, Deserialize, Deserializer, Serialize, Serializer};

        pub(in super::super) fn serialize<T: Serialize, S: Serializer>(
            slice: &Option<Arc<[T]>>,
            to: S,
        ) -> Result<S::Ok, S::Error> {
            slice.as_deref().serialize(to)
        }

        pub(in super::super) fn deserialize<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
            from: D,
        ) -> Result<Option<Arc<[T]>>, D::Error> {
            Option::<Vec<T>>::deserialize(from).map(|slice| slice.map(Arc::from))
        }
    }
}

/// A change of one token's logit, in f32: `(if logit > 0 { logit * positive } else { logit * negative }) + add`, or the nearest
/// finite number.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LogitChange {
    /// The token.
    pub token: u32,
    /// Factor of a logit above 0.
    pub positive: f32,
    /// Factor of any other logit.
    pub negative: f32,
    /// Added last.
    pub add: f32,
}

impl LogitChange {
    /// The changed logit.
    pub(crate) fn apply(&self, logit: f32) -> f32 {
        let factor = if logit > 0.0 {
            self.positive
        } else {
            self.negative
        };
        (logit * factor + self.add).clamp(f32::MIN, f32::MAX)
    }
}

/// A drawn token.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Drawn {
    /// The token.
    pub token: u32,
    /// Its logit in the row, before any change.
    pub logit: f32,
}

/// Maximum sizes of the draws of a step's batches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrawCapacity {
    /// Draws.
    pub draws: usize,
    /// Draws that change logits.
    pub changed: usize,
    /// Words of the lists of allowed tokens and of changes. A list that several draws share (the same `Arc`) counts once.
    pub words: usize,
}

impl DrawCapacity {
    /// Of a step that draws nothing.
    pub const NONE: Self = Self {
        draws: 0,
        changed: 0,
        words: 0,
    };

    /// The smallest capacity that holds these draws.
    #[must_use]
    pub fn of(draws: &[Draw]) -> Self {
        let allowed = distinct(draws.iter().filter_map(|draw| draw.allowed.as_ref()));
        let changes = distinct(changed(draws).map(|draw| &draw.changes));
        let words = allowed.iter().map(|list| list.len());
        let records = changes.iter().map(|list| list.len());
        Self {
            draws: draws.len(),
            changed: changed(draws).count(),
            words: words.sum::<usize>() + CHANGE_WORDS * records.sum::<usize>(),
        }
    }

    /// Whether draws of this size fit.
    #[must_use]
    pub fn holds(&self, size: &Self) -> bool {
        self.beyond(size).is_none()
    }

    /// The first size above this capacity: its name, the maximum, and the value.
    pub(crate) fn beyond(&self, size: &Self) -> Option<(&'static str, usize, usize)> {
        [
            ("draws", self.draws, size.draws),
            ("draws that change logits", self.changed, size.changed),
            ("words of draws", self.words, size.words),
        ]
        .into_iter()
        .find(|(_, most, found)| found > most)
    }
}

/// Words of a [`LogitChange`].
pub(crate) const CHANGE_WORDS: usize = size_of::<LogitChange>() / 4;

/// The draws that change logits.
pub(crate) fn changed(draws: &[Draw]) -> impl Iterator<Item = &Draw> {
    draws.iter().filter(|draw| !draw.changes.is_empty())
}

/// The lists, each once.
pub(crate) fn distinct<'a, T>(lists: impl Iterator<Item = &'a Arc<[T]>>) -> Vec<&'a Arc<[T]>> {
    let mut found: Vec<&Arc<[T]>> = Vec::new();
    for list in lists {
        if !found.iter().any(|known| Arc::ptr_eq(known, list)) {
            found.push(list);
        }
    }
    found
}

/// The parameters of a draw as kernels read them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct DrawNumbers {
    /// The distance from the greatest logit times this is in units of 2^-26 binary orders; 0 draws the best token.
    pub(crate) scale: f32,
    /// Number of tokens kept, or 0.
    pub(crate) top_k: u32,
    /// Share of the weights kept in units of 2^-32, or 0 for all.
    pub(crate) top_p: u32,
    /// Least weight kept.
    pub(crate) least: u32,
}

/// A distance of this many units of [`DrawNumbers::scale`] and more has no weight.
pub(crate) const FARTHEST: f32 = (31_u32 << 26) as f32;

impl Draw {
    /// A draw of the best token of a row.
    #[must_use]
    pub fn best(output: usize) -> Self {
        Self {
            output,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            random: 0,
            allowed: None,
            changes: Arc::default(),
        }
    }

    /// Its parameters as kernels read them.
    pub(crate) fn numbers(&self) -> DrawNumbers {
        if self.temperature == 0.0 {
            return DrawNumbers {
                scale: 0.0,
                top_k: 0,
                top_p: 0,
                least: 0,
            };
        }
        let scale = (f64::from(1_u32 << 26) * std::f64::consts::LOG2_E / self.temperature) as f32;
        let share = (self.top_p * 2_f64.powi(32)).round();
        let share = if share < 2_f64.powi(32) {
            share.max(1.0) as u32
        } else {
            0
        };
        DrawNumbers {
            // Neither infinite nor 0, however extreme the temperature.
            scale: scale.clamp(1e-30, 1e30),
            top_k: u32::try_from(self.top_k).unwrap_or(0),
            top_p: share,
            least: (self.min_p * f64::from(weight(0))).ceil() as u32,
        }
    }

    /// Checks it against rows of `vocabulary` logits.
    pub(crate) fn check(&self, outputs: usize, vocabulary: usize) -> Result<()> {
        let wrong = |what: &str, expected: String, found: String| {
            Err(BackendError::Batch {
                what: what.to_owned(),
                expected,
                found,
            })
        };
        if self.output >= outputs {
            let expected = format!("below {outputs}");
            return wrong(
                "the output row of a draw",
                expected,
                self.output.to_string(),
            );
        }
        for (what, expected, found, holds) in [
            (
                "a draw's temperature",
                "0 or more",
                self.temperature,
                self.temperature >= 0.0,
            ),
            (
                "a draw's top_p",
                "above 0 and at most 1",
                self.top_p,
                self.top_p > 0.0 && self.top_p <= 1.0,
            ),
            (
                "a draw's min_p",
                "from 0 to 1",
                self.min_p,
                (0.0..=1.0).contains(&self.min_p),
            ),
        ] {
            if !holds {
                return wrong(what, expected.to_owned(), found.to_string());
            }
        }
        let (words, found) = (vocabulary.div_ceil(32), self.allowed.as_ref());
        if let Some(found) = found
            .map(|allowed| allowed.len())
            .filter(|len| *len != words)
        {
            let what = "the words of a draw's allowed tokens";
            return wrong(what, words.to_string(), found.to_string());
        }
        let ids = || self.changes.iter().map(|change| change.token);
        if let Some(token) = ids().find(|token| *token as usize >= vocabulary) {
            let what = "a token whose logit is changed";
            return wrong(what, format!("below {vocabulary}"), token.to_string());
        }
        if !ids().is_sorted_by(|a, b| a < b) {
            let (expected, found) = ("ascending".to_owned(), "not".to_owned());
            return wrong("the order of a draw's changes", expected, found);
        }
        Ok(())
    }
}

/// The coefficients of `(2^y - 1) / y` for y in 0 .. 1, in units of 2^-31: the polynomial through its values at the five
/// Chebyshev nodes. With it 2^y is exact to a relative 2.2e-7.
const POWER: [u32; 5] = [
    1_488_523_067,
    515_841_022,
    119_522_614,
    19_755_534,
    3_840_493,
];

/// The upper word of a product.
#[inline(always)]
const fn high(a: u32, b: u32) -> u32 {
    ((a as u64 * b as u64) >> 32) as u32
}

/// The weight of a token at a distance below [`FARTHEST`] from the greatest logit, in units of 2^-26 binary orders: about
/// `2^(31 - distance / 2^26)`.
#[inline(always)]
pub(crate) const fn weight(distance: u32) -> u32 {
    // 2^-f = 2^(1 - f) / 2, whose polynomial has no negative terms.
    let y = !(distance << 6);
    let mut sum = POWER[4];
    sum = POWER[3] + high(sum, y);
    sum = POWER[2] + high(sum, y);
    sum = POWER[1] + high(sum, y);
    sum = POWER[0] + high(sum, y);
    ((1 << 31) + high(sum, y)) >> ((distance >> 26) + 1)
}

/// `sum * share / 2^32`, rounded down, for a sum of weights.
pub(crate) const fn share_of(sum: u64, share: u32) -> u64 {
    (sum >> 32) * share as u64 + (((sum & 0xffff_ffff) * share as u64) >> 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_powers_of_two() {
        for i in 0..400_000_u32 {
            let distance = i * 5_200;
            let expected = 2_f64.powf(31.0 - f64::from(distance) / 2_f64.powi(26));
            let error = (f64::from(weight(distance)) - expected).abs() - 1.0;
            assert!(error <= 2.5e-7 * expected, "{distance}: {error}");
        }
        assert_eq!(weight((31 << 26) - 1), 1);
    }

    #[test]
    fn shares_are_exact_products() {
        for sum in [
            0,
            1,
            7,
            1 << 31,
            (1 << 48) + 12_345,
            u64::from(u32::MAX) << 17,
        ] {
            for share in [1, 1 << 31, u32::MAX, 0x1234_5678] {
                let expected = (u128::from(sum) * u128::from(share)) >> 32;
                assert_eq!(u128::from(share_of(sum, share)), expected);
            }
        }
    }

    #[test]
    fn draws_that_do_not_fit_are_named() {
        let change = |token| LogitChange {
            token,
            positive: 1.0,
            negative: 1.0,
            add: 0.0,
        };
        let best = || Draw::best(1);
        for (draw, said) in [
            (Draw::best(2), "the output row of a draw"),
            (
                Draw {
                    temperature: f64::NAN,
                    ..best()
                },
                "temperature",
            ),
            (
                Draw {
                    top_p: 0.0,
                    ..best()
                },
                "top_p",
            ),
            (
                Draw {
                    min_p: 1.5,
                    ..best()
                },
                "min_p",
            ),
            (
                Draw {
                    allowed: Some([1, 2].into()),
                    ..best()
                },
                "allowed tokens should be 3",
            ),
            (
                Draw {
                    changes: [change(65)].into(),
                    ..best()
                },
                "below 65",
            ),
            (
                Draw {
                    changes: [change(4), change(4)].into(),
                    ..best()
                },
                "ascending",
            ),
        ] {
            let error = draw.check(2, 65).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
        assert!(best().check(2, 65).is_ok());
    }

    #[test]
    fn lists_that_draws_share_count_once() {
        let draws = vec![
            Draw {
                allowed: Some([7, 1].into()),
                ..Draw::best(0)
            };
            3
        ];
        let size = DrawCapacity::of(&draws);
        assert_eq!((size.draws, size.changed, size.words), (3, 0, 2));
        assert!(!DrawCapacity::NONE.holds(&size) && size.holds(&size));
    }
}
