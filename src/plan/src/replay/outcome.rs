//! What came of a replay.

use serde::Serialize;

use crate::model::Split;
use crate::scheduler::Role;

/// A spread of seconds.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Percentiles {
    /// The mean.
    pub mean: f64,
    /// Half take no longer.
    pub p50: f64,
    /// Nine tenths take no longer.
    pub p90: f64,
    /// 99 of 100 take no longer.
    pub p99: f64,
    /// The longest.
    pub max: f64,
}

impl Percentiles {
    /// Of some values (nearest rank); zeros where there are none.
    #[must_use]
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Self::of_sorted(&values)
    }

    /// Of ascending values.
    pub(crate) fn of_sorted(values: &[f64]) -> Self {
        if values.is_empty() {
            return Self::default();
        }
        let at = |q: f64| ranked(values, q);
        Self {
            mean: values.iter().sum::<f64>() / values.len() as f64,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            max: at(1.0),
        }
    }
}

/// The value that a part `q` of ascending values (one at least) does not exceed.
fn ranked(values: &[f64], q: f64) -> f64 {
    let rank = (q * values.len() as f64).ceil() as usize;
    values[rank.clamp(1, values.len()) - 1]
}

/// Every percentile from 0 to 99 of ascending values.
pub(super) fn curve(values: &[f64]) -> Vec<f64> {
    match values {
        [] => Vec::new(),
        _ => (0..100)
            .map(|percent| ranked(values, f64::from(percent) / 100.0))
            .collect(),
    }
}

/// The part of each stage's time that was worked.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Used {
    /// PrfaaS nodes.
    pub prfaas: f64,
    /// The link out of the PrfaaS cluster, of what it was built for.
    pub link: f64,
    /// Local prefill nodes.
    pub local_prefill: f64,
    /// Decode slots.
    pub decode: f64,
}

/// The most that ever waited.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Peaks {
    /// Prompts before the PrfaaS nodes.
    pub prfaas: usize,
    /// Seconds of work before one of them.
    pub prfaas_seconds: f64,
    /// Prompts before the local prefill nodes.
    pub local_prefill: usize,
    /// Seconds of work before one of them, at the number of nodes it began with.
    pub local_prefill_seconds: f64,
    /// Bytes before the link.
    pub link_bytes: u64,
    /// Sequences before the decode slots.
    pub decode: usize,
}

/// One moment.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Sample {
    /// Seconds from the start.
    pub at: f64,
    /// The threshold.
    pub threshold: u32,
    /// Nodes by role.
    #[serde(flatten)]
    pub split: Split,
    /// What the scheduler takes the link's rate for, in bits a second; what it is, where there is no scheduler.
    pub link_bits_per_second: f64,
    /// Bytes that wait for the link.
    pub link_bytes: f64,
    /// Prompts that wait at the PrfaaS cluster.
    pub prfaas_waiting: usize,
    /// Prompts that wait at the local cluster.
    pub local_waiting: usize,
    /// Sequences that wait for a decode slot.
    pub decode_waiting: usize,
}

/// A replay's result.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// Requests, all of which were served.
    pub requests: usize,
    /// From the first arrival to the last token.
    pub seconds: f64,
    /// Requests a second between the tenth part served and nine tenths: the ends, where the system fills and drains, left out.
    pub throughput: f64,
    /// Seconds from arrival to the first token.
    pub ttft: Percentiles,
    /// The same by percentile, 0 to 99.
    pub ttft_by_percentile: Vec<f64>,
    /// Requests whose prefill ran on the PrfaaS cluster.
    pub offloaded: usize,
    /// Tokens of all prompts.
    pub prompt_tokens: u64,
    /// Those of them that a cached prefix, copied or not, spared.
    pub cached_tokens: u64,
    /// Those that were prefilled.
    pub prefilled_tokens: u64,
    /// Bytes of caches shipped to the local cluster.
    pub shipped_bytes: u64,
    /// Bytes of prefixes copied to the local cluster.
    pub copied_home_bytes: u64,
    /// Bytes of prefixes copied to the PrfaaS cluster.
    pub copied_out_bytes: u64,
    /// Bytes sent again, out of the PrfaaS cluster.
    pub retransmitted_bytes: u64,
    /// Mean bits a second out of the PrfaaS cluster, over `seconds`.
    pub egress_bits_per_second: f64,
    /// How busy the stages were, over `seconds`.
    pub used: Used,
    /// How long the queues grew.
    pub peaks: Peaks,
    /// The threshold at the end.
    pub threshold: u32,
    /// The split at the end.
    pub split: Split,
    /// Seconds at which a node took up a role, and which.
    pub conversions: Vec<(f64, Role)>,
    /// The course, a few thousand moments at the most.
    pub series: Vec<Sample>,
}

/// Moments at even distances, thinned as they become many.
#[derive(Debug)]
pub(super) struct Series {
    samples: Vec<Sample>,
    every: usize,
    seen: usize,
}

impl Series {
    const MOST: usize = 4096;

    pub(super) fn new() -> Self {
        Self {
            samples: Vec::new(),
            every: 1,
            seen: 0,
        }
    }

    pub(super) fn push(&mut self, sample: impl FnOnce() -> Sample) {
        if self.seen.is_multiple_of(self.every) {
            self.samples.push(sample());
            if self.samples.len() == Self::MOST {
                let mut number = 0;
                self.samples.retain(|_| {
                    number += 1;
                    number % 2 == 1
                });
                self.every *= 2;
            }
        }
        self.seen += 1;
    }

    pub(super) fn into_samples(self) -> Vec<Sample> {
        self.samples
    }
}
