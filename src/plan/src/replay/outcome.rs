//! The results of a replay.

use serde::Serialize;

use crate::model::Split;
use crate::scheduler::Role;

/// Statistics of times in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Percentiles {
    /// The mean.
    pub mean: f64,
    /// The median.
    pub p50: f64,
    /// The 90th percentile.
    pub p90: f64,
    /// The 99th percentile.
    pub p99: f64,
    /// The maximum.
    pub max: f64,
}

impl Percentiles {
    /// Statistics of values (nearest rank); zeros for no values.
    #[must_use]
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Self::of_sorted(&values)
    }

    /// Statistics of ascending values.
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

/// The value that a fraction `q` of ascending values (at least one) does not exceed.
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

/// Utilisation: the fraction of each stage's time in which it worked.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Used {
    /// PrfaaS nodes.
    pub prfaas: f64,
    /// The link out of the PrfaaS cluster, relative to its nominal rate.
    pub link: f64,
    /// Local prefill nodes.
    pub local_prefill: f64,
    /// Decode slots.
    pub decode: f64,
}

/// Maximum lengths of queues.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Peaks {
    /// Prompts waiting for the PrfaaS nodes.
    pub prfaas: usize,
    /// Seconds of work waiting, per PrfaaS node.
    pub prfaas_seconds: f64,
    /// Prompts waiting for the local prefill nodes.
    pub local_prefill: usize,
    /// Seconds of work waiting, per local prefill node at the start.
    pub local_prefill_seconds: f64,
    /// Bytes waiting for the link.
    pub link_bytes: u64,
    /// Sequences waiting for the decode slots.
    pub decode: usize,
}

/// One sample in time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Sample {
    /// Seconds from the start.
    pub at: f64,
    /// The threshold.
    pub threshold: u32,
    /// Nodes by role.
    #[serde(flatten)]
    pub split: Split,
    /// The scheduler's estimate of the link's rate, in bits per second; the actual rate without a scheduler.
    pub link_bits_per_second: f64,
    /// Bytes waiting for the link.
    pub link_bytes: f64,
    /// Prompts waiting at the PrfaaS cluster.
    pub prfaas_waiting: usize,
    /// Prompts waiting at the local cluster.
    pub local_waiting: usize,
    /// Sequences waiting for a decode slot.
    pub decode_waiting: usize,
}

/// A replay's result.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// Number of requests, all of which were served.
    pub requests: usize,
    /// Seconds from the first arrival to the last token.
    pub seconds: f64,
    /// Requests per second between the first tenth served and the last: without the ends, when the system fills and drains.
    pub throughput: f64,
    /// Seconds from arrival to the first token.
    pub ttft: Percentiles,
    /// The same by percentile, 0 to 99.
    pub ttft_by_percentile: Vec<f64>,
    /// Number of requests whose prefill ran on the PrfaaS cluster.
    pub offloaded: usize,
    /// Tokens of all prompts.
    pub prompt_tokens: u64,
    /// Tokens that were not prefilled because of a cached prefix, copied or not.
    pub cached_tokens: u64,
    /// Tokens that were prefilled.
    pub prefilled_tokens: u64,
    /// Bytes of caches sent to the local cluster.
    pub shipped_bytes: u64,
    /// Bytes of prefixes copied to the local cluster.
    pub copied_home_bytes: u64,
    /// Bytes of prefixes copied to the PrfaaS cluster.
    pub copied_out_bytes: u64,
    /// Bytes sent again, out of the PrfaaS cluster.
    pub retransmitted_bytes: u64,
    /// Mean bits per second out of the PrfaaS cluster, over `seconds`.
    pub egress_bits_per_second: f64,
    /// Utilisation of the stages, over `seconds`.
    pub used: Used,
    /// Maximum lengths of the queues.
    pub peaks: Peaks,
    /// The threshold at the end.
    pub threshold: u32,
    /// The split at the end.
    pub split: Split,
    /// Conversions: the time in seconds at which a node took a new role, and the role.
    pub conversions: Vec<(f64, Role)>,
    /// Samples over time, a few thousand at most.
    pub series: Vec<Sample>,
}

/// Samples at equal intervals, which are thinned as they become many.
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
