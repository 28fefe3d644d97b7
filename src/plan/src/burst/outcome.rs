//! The results of a replay.

use serde::Serialize;

use super::Policy;

/// Statistics of times in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Spread {
    /// The mean.
    pub mean: f64,
    /// The median.
    pub p50: f64,
    /// The 90th percentile.
    pub p90: f64,
    /// The 99th percentile.
    pub p99: f64,
    /// The 99.9th percentile.
    pub p999: f64,
    /// The maximum.
    pub max: f64,
}

impl Spread {
    /// Statistics of ascending values (nearest rank); zeros for no values.
    #[must_use]
    pub fn of_sorted(values: &[f64]) -> Self {
        if values.is_empty() {
            return Self::default();
        }
        let at = |q: f64| {
            let rank = (q * values.len() as f64).ceil() as usize;
            values[rank.clamp(1, values.len()) - 1]
        };
        Self {
            mean: values.iter().sum::<f64>() / values.len() as f64,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            max: at(1.0),
        }
    }
}

/// One sample in time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Sample {
    /// Seconds from the start.
    pub at: f64,
    /// Bytes that running requests use and queued ones need.
    pub demand_bytes: u64,
    /// Bytes available for caches.
    pub capacity_bytes: u64,
    /// Requests that wait for memory or for their first step.
    pub waiting: usize,
    /// Groups of several instances.
    pub groups: usize,
}

/// Counts of events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Counts {
    /// Caches that were given up.
    pub recomputed: u64,
    /// Tokens that had to be prefilled again.
    pub recomputed_tokens: u64,
    /// Caches that were moved to host memory.
    pub swapped: u64,
    /// Caches that were moved to another instance.
    pub migrated: u64,
    /// Copies of parameters that were dropped.
    pub drops: u64,
    /// Groups whose parameters were restored.
    pub restores: u64,
    /// The maximum size of a group.
    pub largest_group: usize,
    /// Bytes of caches that were exchanged.
    pub exchanged_bytes: u64,
    /// Bytes of parameters that were loaded again.
    pub restored_bytes: u64,
    /// Bytes of caches that were allocated.
    pub allocated_bytes: u64,
    /// Bytes of caches that were freed.
    pub freed_bytes: u64,
    /// Steps or micro-batches.
    pub steps: u64,
}

/// A replay's result.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// The policy.
    pub policy: Policy,
    /// Requests that were answered.
    pub requests: usize,
    /// Tokens of all answers.
    pub output_tokens: u64,
    /// Seconds from the first arrival to the last token.
    pub seconds: f64,
    /// Seconds from arrival to the first token.
    pub ttft: Spread,
    /// Seconds between two tokens: for each answer of more than one token, the time from its first to its last token, divided
    /// by their number minus one.
    pub tpot: Spread,
    /// TTFT by [`percentiles`].
    pub ttft_by_percentile: Vec<f64>,
    /// TPOT by [`percentiles`].
    pub tpot_by_percentile: Vec<f64>,
    /// The fraction of requests whose TTFT is more than five times, and more than ten times, the lowest P50 of all policies,
    /// which are the paper's limits for chats and for summaries. 0 for the replay of a single policy.
    pub late: [f64; 2],
    /// Mean over time of the bytes that running requests use and queued ones need.
    pub mean_demand_bytes: f64,
    /// Maximum number of bytes of caches.
    pub peak_held_bytes: u64,
    /// The fraction of the stages' time, while a pipeline had work, that they were idle between micro-batches.
    pub bubbles: f64,
    /// Seconds per exchange.
    pub exchange_seconds: Spread,
    /// Counts of events.
    pub counts: Counts,
    /// Samples over time, one second apart.
    pub series: Vec<Sample>,
    /// Seconds to the first token, ascending.
    #[serde(skip)]
    pub(super) first_tokens: Vec<f64>,
}

/// Computes each policy's fractions of late requests, relative to the lowest P50 of all.
pub(super) fn judge(outcomes: &mut [Outcome]) {
    let least = outcomes
        .iter()
        .map(|one| one.ttft.p50)
        .fold(f64::INFINITY, f64::min);
    for one in outcomes {
        let count = one.first_tokens.len().max(1) as f64;
        let late = |times: f64| {
            let in_time = one
                .first_tokens
                .partition_point(|ttft| *ttft <= times * least);
            (one.first_tokens.len() - in_time) as f64 / count
        };
        one.late = [late(5.0), late(10.0)];
    }
}

/// 0 to 98, then in steps of a tenth to 99.9.
pub fn percentiles() -> impl Iterator<Item = f64> {
    let tenths = (990u32..1000).map(|tenth| f64::from(tenth) / 10.0);
    (0u32..99).map(f64::from).chain(tenths)
}

pub(super) fn curve(values: &[f64]) -> Vec<f64> {
    if values.is_empty() {
        return Vec::new();
    }
    percentiles()
        .map(|percent| {
            let rank = (percent / 100.0 * values.len() as f64).ceil() as usize;
            values[rank.clamp(1, values.len()) - 1]
        })
        .collect()
}
