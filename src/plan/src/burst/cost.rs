//! The time of a step, fitted to measurements.
//!
//! The paper's cost of a chunk of `c` prompt tokens after `p` cached ones is `alpha (p c + (c^2 + c) / 2) + beta c + gamma`,
//! and a batch of `n` chunks saves `(n - 1) lambda` because it reads the parameters once. Here `lambda = gamma`: the cost of
//! an empty chunk is that of reading the parameters. In the paper a decoded token is a chunk of one. Here it has coefficients
//! of its own, because decode is limited by reading caches and prefill by arithmetic: `delta + kappa p` per sequence.
//!
//! Both are least squares of the relative errors, `sum ((fit - seconds) / seconds)^2`, over the instance's points, with
//! coefficients that must not be negative: a negative one is left out and the others are fitted again.

use serde::Serialize;

use super::batch::Chunk;
use super::instance::{Decoded, Instance, Prefilled};
use crate::{Error, Result};

/// The coefficients.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Costs {
    /// Seconds per pair of tokens in prefill's attention.
    pub alpha: f64,
    /// Seconds per prompt token.
    pub beta: f64,
    /// Seconds per step with prompt tokens, for any number of them.
    pub gamma: f64,
    /// Seconds per decoded token.
    pub delta: f64,
    /// Seconds per cached token that a decoded token reads.
    pub kappa: f64,
    /// Seconds per step with decoded tokens, for any number of them.
    pub decode_gamma: f64,
    /// The largest relative error at a point of prefill.
    pub prefill_error: f64,
    /// The largest relative error at a point of decode.
    pub decode_error: f64,
}

impl Costs {
    /// Fitted to an instance's points.
    ///
    /// # Errors
    /// Too few points for the coefficients.
    pub fn of(instance: &Instance) -> Result<Self> {
        Self::fit(instance.prefill(), instance.decode()).ok_or_else(|| Error::Profile {
            name: instance.name().into(),
            what: format!(
                "{} points of prefill and {} of decode; a fit needs three that differ of each",
                instance.prefill().len(),
                instance.decode().len()
            ),
        })
    }

    /// Fitted to points; `None` if they do not determine the coefficients.
    #[must_use]
    pub fn fit(prefill: &[Prefilled], decode: &[Decoded]) -> Option<Self> {
        let prefill: Vec<_> = prefill
            .iter()
            .map(|point| {
                let c = f64::from(point.tokens);
                ([(c * c + c) / 2.0, c, 1.0], point.seconds)
            })
            .collect();
        let decode: Vec<_> = decode
            .iter()
            .map(|point| {
                let n = f64::from(point.sequences);
                ([n, n * f64::from(point.context), 1.0], point.seconds)
            })
            .collect();
        let ([alpha, beta, gamma], prefill_error) = least_squares(&prefill)?;
        let ([delta, kappa, decode_gamma], decode_error) = least_squares(&decode)?;
        Some(Self {
            alpha,
            beta,
            gamma,
            delta,
            kappa,
            decode_gamma,
            prefill_error,
            decode_error,
        })
    }

    /// Seconds that a chunk adds to a step: the paper's cost without `gamma`.
    #[must_use]
    pub fn chunk(&self, chunk: Chunk) -> f64 {
        let (p, c) = (f64::from(chunk.prefix), f64::from(chunk.tokens));
        self.alpha * (p * c + (c * c + c) / 2.0) + self.beta * c
    }

    /// Seconds that `sequences` decoded tokens add to a step if together they read `cached` tokens.
    #[must_use]
    pub fn decode(&self, sequences: usize, cached: u64) -> f64 {
        self.delta * sequences as f64 + self.kappa * cached as f64
    }

    /// Seconds per step, independent of its tokens.
    #[must_use]
    pub fn fixed(&self, prompts: bool, decodes: bool) -> f64 {
        match (prompts, decodes) {
            (true, true) => self.gamma.max(self.decode_gamma),
            (true, false) => self.gamma,
            (false, true) => self.decode_gamma,
            (false, false) => 0.0,
        }
    }

    /// Minimum seconds of a step, for reading the parameters.
    #[must_use]
    pub fn read(&self) -> f64 {
        self.gamma.max(self.decode_gamma)
    }
}

/// Coefficients that are not negative, and the largest relative error.
fn least_squares(points: &[([f64; 3], f64)]) -> Option<([f64; 3], f64)> {
    let mut used = [true; 3];
    loop {
        let found = solve(points, used)?;
        match (0..3).find(|i| found[*i] < 0.0) {
            Some(negative) => used[negative] = false,
            None => {
                let error = |(x, y): &([f64; 3], f64)| {
                    let fit: f64 = (0..3).map(|i| found[i] * x[i]).sum();
                    (fit / y - 1.0).abs()
                };
                return Some((found, points.iter().map(error).fold(0.0, f64::max)));
            }
        }
    }
}

/// The normal equations of the relative errors, by Gaussian elimination; `None` if they are singular.
fn solve(points: &[([f64; 3], f64)], used: [bool; 3]) -> Option<[f64; 3]> {
    let terms: Vec<usize> = (0..3).filter(|i| used[*i]).collect();
    if points.len() < terms.len() || terms.is_empty() {
        return None;
    }
    // Columns scaled to size 1, so that pivots can be compared.
    let mut scale = [0.0f64; 3];
    for (x, y) in points {
        for i in 0..3 {
            scale[i] = scale[i].max((x[i] / y).abs());
        }
    }
    let n = terms.len();
    let mut rows = vec![vec![0.0; n + 1]; n];
    for (x, y) in points {
        for (r, i) in terms.iter().enumerate() {
            let left = x[*i] / y / scale[*i];
            for (c, j) in terms.iter().enumerate() {
                rows[r][c] += left * x[*j] / y / scale[*j];
            }
            rows[r][n] += left;
        }
    }
    for step in 0..n {
        let best =
            (step..n).max_by(|a, b| rows[*a][step].abs().total_cmp(&rows[*b][step].abs()))?;
        rows.swap(step, best);
        if rows[step][step].abs() < 1e-12 {
            return None;
        }
        for below in step + 1..n {
            let factor = rows[below][step] / rows[step][step];
            for c in step..=n {
                rows[below][c] -= factor * rows[step][c];
            }
        }
    }
    let mut found = [0.0; 3];
    let mut solved = vec![0.0; n];
    for step in (0..n).rev() {
        let known: f64 = (step + 1..n).map(|c| rows[step][c] * solved[c]).sum();
        solved[step] = (rows[step][n] - known) / rows[step][step];
        found[terms[step]] = solved[step] / scale[terms[step]];
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn points(alpha: f64, beta: f64, gamma: f64) -> Vec<Prefilled> {
        [64u32, 512, 2048, 8192, 32768]
            .map(|tokens| {
                let c = f64::from(tokens);
                let seconds = alpha * (c * c + c) / 2.0 + beta * c + gamma;
                Prefilled { tokens, seconds }
            })
            .to_vec()
    }

    fn decodes(delta: f64, kappa: f64, gamma: f64) -> Vec<Decoded> {
        [(1, 100), (16, 1000), (64, 500), (200, 4000)]
            .map(|(sequences, context)| {
                let n = f64::from(sequences);
                let seconds = gamma + delta * n + kappa * n * f64::from(context);
                Decoded {
                    sequences,
                    context,
                    seconds,
                }
            })
            .to_vec()
    }

    proptest! {
        #[test]
        fn what_made_the_points_is_found_again(
            alpha in 1e-11f64..1e-8, beta in 1e-6f64..1e-3, gamma in 1e-4f64..0.1,
            delta in 1e-6f64..1e-3, kappa in 1e-9f64..1e-6,
        ) {
            let costs = Costs::fit(&points(alpha, beta, gamma), &decodes(delta, kappa, gamma)).unwrap();
            for (found, made) in [
                (costs.alpha, alpha), (costs.beta, beta), (costs.gamma, gamma),
                (costs.delta, delta), (costs.kappa, kappa), (costs.decode_gamma, gamma),
            ] {
                prop_assert!((found / made - 1.0).abs() < 1e-3, "{found} {made}");
            }
            prop_assert!(costs.prefill_error < 1e-6 && costs.decode_error < 1e-6);
        }

        #[test]
        fn a_prompt_costs_the_same_in_whatever_chunks(
            cuts in prop::collection::vec(1u32..4000, 1..8), alpha in 0.0f64..1e-8,
        ) {
            let costs = Costs { alpha, ..Costs::fit(&points(1e-9, 1e-4, 0.01), &decodes(1e-4, 1e-8, 0.01)).unwrap() };
            let whole = costs.chunk(Chunk { job: 0, prefix: 0, tokens: cuts.iter().sum() });
            let mut prefix = 0;
            let mut sum = 0.0;
            for tokens in cuts {
                sum += costs.chunk(Chunk { job: 0, prefix, tokens });
                prefix += tokens;
            }
            prop_assert!((sum / whole - 1.0).abs() < 1e-9);
        }
    }

    #[test]
    fn a_coefficient_that_would_be_negative_is_left_out() {
        // Seconds that rise less than linearly: a square's coefficient would be negative.
        let points = [(100, 1.0), (1000, 5.0), (10_000, 20.0)]
            .map(|(tokens, seconds)| Prefilled { tokens, seconds });
        let costs = Costs::fit(&points, &decodes(1e-4, 1e-8, 0.01)).unwrap();
        assert_eq!(costs.alpha, 0.0);
        assert!(costs.beta > 0.0 && costs.gamma > 0.0 && costs.prefill_error > 0.01);
        assert_eq!(Costs::fit(&points[..2], &decodes(1e-4, 1e-8, 0.01)), None);
    }

    #[test]
    fn the_built_in_instances_are_fitted_within_what_the_document_says() {
        for name in Instance::built_in() {
            let costs = Costs::of(&Instance::open(name).unwrap()).unwrap();
            assert!(
                costs.prefill_error < 0.25 && costs.decode_error < 0.25,
                "{name}: {costs:?}"
            );
        }
    }
}
