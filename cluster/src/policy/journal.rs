//! The last decisions, for whoever watches.

use std::collections::VecDeque;

use kimi_linear_plan::route::{Cached, Site};
use serde::Serialize;

/// Decisions that are kept.
pub const KEPT: usize = 1000;

/// Why a cluster was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// More uncached tokens than the threshold, or not more.
    Threshold,
    /// The PrfaaS cluster has so much more of the prompt in its caches that its prefill and the link are faster.
    Prefix,
    /// The other cluster was wanted, and has no worker for it.
    OnlyCluster,
}

/// Where one prompt is prefilled. A request that migrates is decided on again.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Decided {
    /// Its number, from 1.
    pub sequence: u64,
    /// Seconds since 1970.
    pub time: f64,
    /// Tokens of the prompt.
    pub tokens: u32,
    /// Leading tokens that the best local worker has cached.
    pub cached_local: u32,
    /// The same of the PrfaaS cluster.
    pub cached_prfaas: u32,
    /// Uncached tokens that were compared with the threshold.
    pub uncached: u32,
    /// The cluster.
    pub site: Site,
    /// Dynamo's id of the worker, in decimal: JSON's readers round large numbers.
    pub worker: String,
    /// The threshold; `None` if nothing is offloaded.
    pub threshold: Option<u32>,
    /// Whether the wanted cluster had no worker.
    pub fallback: bool,
    /// Why.
    pub reason: Reason,
}

/// Sums over all decisions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sums {
    /// Prompts that were prefilled locally.
    pub local: u64,
    /// Prompts that were prefilled by the PrfaaS cluster.
    pub prfaas: u64,
    /// Tokens of the first.
    pub local_tokens: u64,
    /// Tokens of the second.
    pub prfaas_tokens: u64,
    /// Decisions for which the wanted cluster had no worker.
    pub fallbacks: u64,
}

impl Sums {
    /// The part of the prompts that was offloaded; 0 without any.
    #[must_use]
    pub fn offloaded(&self) -> f64 {
        self.prfaas as f64 / (self.local + self.prfaas).max(1) as f64
    }
}

/// The last decisions, and sums over all.
#[derive(Debug, Default)]
pub struct Journal {
    last: u64,
    kept: VecDeque<Decided>,
    sums: Sums,
}

impl Journal {
    /// The number of the next decision.
    #[must_use]
    pub fn next(&self) -> u64 {
        self.last + 1
    }

    /// Sums over all decisions.
    #[must_use]
    pub fn sums(&self) -> Sums {
        self.sums
    }

    /// Takes a decision, which gets the next number.
    pub(super) fn take(&mut self, mut decided: Decided) {
        self.last += 1;
        decided.sequence = self.last;
        let tokens = u64::from(decided.tokens);
        match decided.site {
            Site::Local => {
                self.sums.local += 1;
                self.sums.local_tokens += tokens;
            }
            Site::Prfaas => {
                self.sums.prfaas += 1;
                self.sums.prfaas_tokens += tokens;
            }
        }
        self.sums.fallbacks += u64::from(decided.fallback);
        if self.kept.len() == KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back(decided);
    }

    /// The kept decisions with larger numbers, oldest first, and the last number.
    #[must_use]
    pub fn after(&self, number: u64) -> (u64, Vec<Decided>) {
        let from = self.kept.partition_point(|it| it.sequence <= number);
        (self.last, self.kept.range(from..).cloned().collect())
    }
}

impl Decided {
    /// A decision without a number.
    pub(super) fn new(tokens: u32, cached: Cached, site: Site, worker: u64) -> Self {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Self {
            sequence: 0,
            time: now.map_or(0.0, |since| since.as_secs_f64()),
            tokens,
            cached_local: cached.local,
            cached_prfaas: cached.prfaas,
            uncached: tokens,
            site,
            worker: worker.to_string(),
            threshold: None,
            fallback: false,
            reason: Reason::Threshold,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_thousand_are_kept_and_all_are_counted() {
        let mut journal = Journal::default();
        for number in 0..1500 {
            let site = match number % 3 {
                0 => Site::Prfaas,
                _ => Site::Local,
            };
            journal.take(Decided::new(10, Cached::default(), site, number));
        }
        let (last, all) = journal.after(0);
        assert_eq!((last, all.len(), all[0].sequence), (1500, KEPT, 501));
        let (_, new) = journal.after(1498);
        assert_eq!(new.len(), 2);
        assert_eq!(new[1].worker, "1499");
        assert!(journal.after(1500).1.is_empty() && journal.after(9999).1.is_empty());
        let sums = journal.sums();
        assert_eq!((sums.local, sums.prfaas), (1000, 500));
        assert_eq!((sums.local_tokens, sums.prfaas_tokens), (10_000, 5000));
        assert!((sums.offloaded() - 1.0 / 3.0).abs() < 1e-12);
    }
}
