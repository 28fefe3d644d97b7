//! A distribution of uncached prompt lengths, cut at a threshold in logarithmic time.

use crate::{Error, Result};

/// Number of quantiles that represent a continuous distribution: at 8,192 the conditional means are within 0.1 % of their
/// integrals.
pub const QUANTILES: usize = 8192;

/// Lengths in tokens, ascending, with their running sums.
#[derive(Debug, Clone, PartialEq)]
pub struct Lengths {
    sorted: Vec<u32>,
    /// `sums[i]` is the sum of the first `i`.
    sums: Vec<u64>,
}

/// A distribution cut at a threshold: `p`, `l_long`, `l_short` of equations (3) and (4).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cut {
    /// `P(L > t)`.
    pub share_long: f64,
    /// `E[L | L > t]`, or 0 if there are none.
    pub long: f64,
    /// `E[L | L <= t]`, or 0 if there are none.
    pub short: f64,
}

impl Lengths {
    /// From observed lengths.
    ///
    /// # Errors
    /// No lengths.
    pub fn observed(mut lengths: Vec<u32>) -> Result<Self> {
        if lengths.is_empty() {
            return Err(Error::NoRequests);
        }
        lengths.sort_unstable();
        let mut sums = Vec::with_capacity(lengths.len() + 1);
        let mut sum = 0u64;
        sums.push(0);
        for length in &lengths {
            sum += u64::from(*length);
            sums.push(sum);
        }
        Ok(Self {
            sorted: lengths,
            sums,
        })
    }

    /// Number of lengths.
    #[must_use]
    pub fn count(&self) -> usize {
        self.sorted.len()
    }

    /// The lengths, ascending.
    #[must_use]
    pub fn sorted(&self) -> &[u32] {
        &self.sorted
    }

    /// The mean.
    #[must_use]
    pub fn mean(&self) -> f64 {
        self.sums[self.count()] as f64 / self.count() as f64
    }

    /// The length that a fraction `q` of them does not exceed (the nearest rank).
    #[must_use]
    pub fn quantile(&self, q: f64) -> u32 {
        let rank = (q.clamp(0.0, 1.0) * self.count() as f64).ceil() as usize;
        self.sorted[rank.clamp(1, self.count()) - 1]
    }

    /// The mean of a function of the lengths.
    pub fn mean_of(&self, of: impl Fn(f64) -> f64) -> f64 {
        let sum: f64 = self
            .sorted
            .iter()
            .map(|length| of(f64::from(*length)))
            .sum();
        sum / self.count() as f64
    }

    /// The cut at threshold `t`.
    #[must_use]
    pub fn cut(&self, threshold: u32) -> Cut {
        self.cut_at(self.short_at(threshold))
    }

    /// Number of lengths of at most `threshold`.
    pub(crate) fn short_at(&self, threshold: u32) -> usize {
        self.sorted.partition_point(|length| *length <= threshold)
    }

    /// The cut with the first `short` lengths on the short side.
    pub(crate) fn cut_at(&self, short: usize) -> Cut {
        let (count, long) = (self.count(), self.count() - short);
        let mean = |sum: u64, count: usize| match count {
            0 => 0.0,
            count => sum as f64 / count as f64,
        };
        Cut {
            share_long: long as f64 / count as f64,
            long: mean(self.sums[count] - self.sums[short], long),
            short: mean(self.sums[short], short),
        }
    }

    /// Every threshold with a different cut, as (threshold, number of short lengths): 0, then each distinct length. Any other
    /// threshold has the same cut as the next lower one of these.
    pub(crate) fn cuts(&self) -> impl Iterator<Item = (u32, usize)> {
        let last = |i: usize| self.sorted.get(i + 1) != Some(&self.sorted[i]);
        let distinct = (0..self.count()).filter(move |i| last(*i));
        std::iter::once((0, 0)).chain(distinct.map(|i| (self.sorted[i], i + 1)))
    }
}

/// `LogNormal(mu, sigma)` in tokens, truncated to `[low, high]` (numbers outside are drawn again, not moved to the border).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogNormal {
    /// Mean of the logarithm.
    pub mu: f64,
    /// Standard deviation of the logarithm.
    pub sigma: f64,
    /// The shortest length.
    pub low: u32,
    /// The longest.
    pub high: u32,
}

impl LogNormal {
    /// The prompts of the paper's case study; its 128K is 128,000 (`docs/prfaas.md`).
    #[must_use]
    pub fn case_study() -> Self {
        Self {
            mu: 9.90,
            sigma: 1.00,
            low: 128,
            high: 128_000,
        }
    }

    /// Its quantiles at the middles of [`QUANTILES`] equal parts.
    ///
    /// # Errors
    /// A sigma that is not above 0 or bounds that contain almost none of the distribution.
    pub fn lengths(&self) -> Result<Lengths> {
        let normal = |x: f64| 0.5 * libm::erfc(-x / std::f64::consts::SQRT_2);
        let standard = |length: u32| (f64::from(length).ln() - self.mu) / self.sigma;
        let (low, high) = (standard(self.low), standard(self.high));
        let (below, above) = (normal(low), normal(high));
        // Less than a millionth within the bounds: quantiles would be noise, and drawing again would take too long.
        if !(self.sigma > 0.0 && self.low > 0 && above - below > 1e-6) {
            return Err(Error::Spec {
                text: self.to_string(),
                expected: "expected lognormal:MU,SIGMA,LOW,HIGH with SIGMA above 0 and bounds that hold a part of it".into(),
            });
        }
        let quantile = |q: f64| {
            let (mut from, mut to) = (low, high);
            for _ in 0..48 {
                let middle = 0.5 * (from + to);
                if normal(middle) < q {
                    from = middle;
                } else {
                    to = middle;
                }
            }
            (self.mu + self.sigma * from).exp().round() as u32
        };
        let part = (above - below) / QUANTILES as f64;
        let lengths = (0..QUANTILES).map(|i| quantile(below + part * (i as f64 + 0.5)));
        Lengths::observed(lengths.collect())
    }
}

impl std::fmt::Display for LogNormal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            mu,
            sigma,
            low,
            high,
        } = self;
        write!(f, "lognormal:{mu},{sigma},{low},{high}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_case_studys_prompts_have_the_papers_mean() {
        let lengths = LogNormal::case_study().lengths().unwrap();
        // "A mean of about 27K".
        assert!(
            (lengths.mean() - 27_313.0).abs() < 30.0,
            "{}",
            lengths.mean()
        );
        assert!((f64::from(lengths.quantile(0.9)) - 61_977.0).abs() < 100.0);
        assert!(lengths.sorted()[0] >= 128 && lengths.quantile(1.0) <= 128_000);
    }

    #[test]
    fn bounds_that_hold_nothing_are_refused() {
        for (sigma, low, high) in [(0.0, 1, 10), (1.0, 10, 1), (1.0, 1, 2), (1.0, 0, 1000)] {
            let bad = LogNormal {
                mu: 9.9,
                sigma,
                low,
                high,
            };
            assert!(
                bad.lengths()
                    .unwrap_err()
                    .to_string()
                    .contains("lognormal:")
            );
        }
        assert!(Lengths::observed(Vec::new()).is_err());
    }

    proptest! {
        #[test]
        fn a_cut_is_what_its_definition_says(
            lengths in prop::collection::vec(1u32..50, 1..60), threshold in 0u32..60,
        ) {
            let cut = Lengths::observed(lengths.clone()).unwrap().cut(threshold);
            let (long, short): (Vec<_>, Vec<_>) = lengths.iter().partition(|length| **length > threshold);
            let mean = |of: &[u32]| match of.len() {
                0 => 0.0,
                n => f64::from(of.iter().sum::<u32>()) / n as f64,
            };
            prop_assert_eq!(cut.share_long, long.len() as f64 / lengths.len() as f64);
            prop_assert!((cut.long - mean(&long)).abs() < 1e-9);
            prop_assert!((cut.short - mean(&short)).abs() < 1e-9);
        }
    }
}
