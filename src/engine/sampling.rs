//! Which token comes next: greedy, or drawn after temperature, top-k, top-p and min-p, in that order.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::backend::Choice;
use crate::error::EngineError;

/// The most candidates that are read back for a top-k; above it whole rows are.
const MOST_CANDIDATES: usize = 64;

/// How tokens are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 is greedy.
    pub temperature: f64,
    /// Only the best `top_k` are drawn from; 0 is all.
    pub top_k: usize,
    /// Only the best are drawn from whose probabilities together reach this; 1 is all.
    pub top_p: f64,
    /// Only those are drawn from whose probability is at least this part of the best one's; 0 is all.
    pub min_p: f64,
    /// Seeds the draws: one seed and one prompt give the same tokens.
    pub seed: u64,
}

impl Sampling {
    /// The best token each time.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        seed: 0,
    };

    /// Checks every parameter's range.
    ///
    /// # Errors
    /// The first that is outside it.
    pub fn check(&self) -> Result<(), EngineError> {
        let rules = [
            (
                "temperature",
                "0 or more",
                self.temperature,
                self.temperature >= 0.0 && self.temperature.is_finite(),
            ),
            (
                "top_p",
                "above 0 and at most 1",
                self.top_p,
                self.top_p > 0.0 && self.top_p <= 1.0,
            ),
            (
                "min_p",
                "from 0 to 1",
                self.min_p,
                (0.0..=1.0).contains(&self.min_p),
            ),
        ];
        for (parameter, expected, found, holds) in rules {
            if !holds {
                return Err(EngineError::Sampling {
                    parameter,
                    expected,
                    found,
                });
            }
        }
        Ok(())
    }

    /// Candidates that must be read back for each token.
    #[must_use]
    pub fn candidates(&self) -> usize {
        if self.temperature > 0.0 && self.top_k <= MOST_CANDIDATES {
            self.top_k.max(1)
        } else {
            1
        }
    }

    /// Whether whole rows must be read back.
    #[must_use]
    pub fn needs_row(&self) -> bool {
        self.temperature > 0.0 && !(1..=MOST_CANDIDATES).contains(&self.top_k)
    }
}

/// Draws one sequence's tokens.
pub struct Sampler {
    sampling: Sampling,
    random: ChaCha8Rng,
}

impl Sampler {
    /// A sampler at the start of its seed's stream.
    #[must_use]
    pub fn new(sampling: Sampling) -> Self {
        Self {
            sampling,
            random: ChaCha8Rng::seed_from_u64(sampling.seed),
        }
    }

    /// The next token, from a row's candidates, or from the whole row where [`Sampling::needs_row`] asked for it.
    pub fn choose(&mut self, choice: &Choice, row: &[f32]) -> u32 {
        let best = choice.candidates.first().map_or(0, |candidate| candidate.0);
        if self.sampling.temperature == 0.0 {
            return best;
        }
        let mut candidates: Vec<(u32, f64)> = if self.sampling.needs_row() {
            let mut row: Vec<(u32, f64)> = (0..).zip(row.iter().copied().map(f64::from)).collect();
            row.sort_by(|a, b| b.1.total_cmp(&a.1));
            row
        } else {
            choice
                .candidates
                .iter()
                .map(|(token, logit)| (*token, f64::from(*logit)))
                .collect()
        };
        if self.sampling.top_k > 0 {
            candidates.truncate(self.sampling.top_k);
        }
        // From logits to probabilities that need not sum to 1: the best one's is 1.
        let greatest = candidates.first().map_or(0.0, |candidate| candidate.1);
        for candidate in &mut candidates {
            candidate.1 = ((candidate.1 - greatest) / self.sampling.temperature).exp();
        }
        let total: f64 = candidates.iter().map(|candidate| candidate.1).sum();
        let mut reached = 0.0;
        let kept = candidates.iter().take_while(|candidate| {
            let keep = reached < self.sampling.top_p * total && candidate.1 >= self.sampling.min_p;
            reached += candidate.1;
            keep
        });
        let kept = kept.count().max(1);
        let total: f64 = candidates[..kept].iter().map(|candidate| candidate.1).sum();
        let mut left = self.random.random::<f64>() * total;
        for candidate in &candidates[..kept] {
            left -= candidate.1;
            if left < 0.0 {
                return candidate.0;
            }
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(logits: &[f32]) -> Choice {
        let mut candidates: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
        candidates.sort_by(|a, b| b.1.total_cmp(&a.1));
        Choice {
            candidates,
            log_normaliser: 0.0,
            target_logit: None,
            finite: true,
        }
    }

    fn draws(sampling: Sampling, logits: &[f32]) -> Vec<usize> {
        let (mut sampler, mut counts) = (Sampler::new(sampling), vec![0; logits.len()]);
        for _ in 0..20_000 {
            counts[sampler.choose(&choice(logits), logits) as usize] += 1;
        }
        counts
    }

    const LOGITS: [f32; 4] = [0.0, 2.0, 1.0, -1.0];

    #[test]
    fn greedy_takes_the_best() {
        assert_eq!(draws(Sampling::GREEDY, &LOGITS), [0, 20_000, 0, 0]);
    }

    #[test]
    fn draws_follow_the_softmax() {
        let temperature = 0.7;
        let counts = draws(
            Sampling {
                temperature,
                ..Sampling::GREEDY
            },
            &LOGITS,
        );
        let weights = LOGITS.map(|logit| (f64::from(logit) / temperature).exp());
        let total: f64 = weights.iter().sum();
        for (count, weight) in counts.iter().zip(weights) {
            let (p, seen) = (weight / total, *count as f64 / 20_000.0);
            // Five standard deviations.
            assert!(
                (seen - p).abs() < 5.0 * (p * (1.0 - p) / 20_000.0).sqrt(),
                "{seen} against {p}"
            );
        }
    }

    #[test]
    fn cuts_leave_out_what_they_say() {
        let at = Sampling {
            temperature: 1.0,
            ..Sampling::GREEDY
        };
        let zero = |counts: &[usize]| counts.iter().map(|count| *count == 0).collect::<Vec<_>>();
        assert_eq!(
            zero(&draws(Sampling { top_k: 2, ..at }, &LOGITS)),
            [true, false, false, true]
        );
        // Probabilities 0.64, 0.24, 0.09, 0.03.
        assert_eq!(
            zero(&draws(Sampling { top_p: 0.6, ..at }, &LOGITS)),
            [true, false, true, true]
        );
        assert_eq!(
            zero(&draws(Sampling { top_p: 0.9, ..at }, &LOGITS)),
            [false, false, false, true]
        );
        assert_eq!(
            zero(&draws(Sampling { min_p: 0.3, ..at }, &LOGITS)),
            [true, false, false, true]
        );
    }

    #[test]
    fn a_seed_repeats_and_another_differs() {
        let at = |seed| {
            draws(
                Sampling {
                    temperature: 1.0,
                    seed,
                    ..Sampling::GREEDY
                },
                &LOGITS,
            )
        };
        assert_eq!(at(1), at(1));
        assert_ne!(at(1), at(2));
    }

    #[test]
    fn parameters_outside_their_range_are_named() {
        for (sampling, name) in [
            (
                Sampling {
                    temperature: -1.0,
                    ..Sampling::GREEDY
                },
                "temperature",
            ),
            (
                Sampling {
                    temperature: f64::NAN,
                    ..Sampling::GREEDY
                },
                "temperature",
            ),
            (
                Sampling {
                    top_p: 0.0,
                    ..Sampling::GREEDY
                },
                "top_p",
            ),
            (
                Sampling {
                    min_p: 1.5,
                    ..Sampling::GREEDY
                },
                "min_p",
            ),
        ] {
            assert!(sampling.check().unwrap_err().to_string().starts_with(name));
        }
    }
}
