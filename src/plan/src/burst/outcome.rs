//! What came of a replay.

use serde::Serialize;

use super::Policy;

/// A spread of seconds.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Spread {
    /// The mean.
    pub mean: f64,
    /// Half take no longer.
    pub p50: f64,
    /// Nine tenths take no longer.
    pub p90: f64,
    /// 99 of 100 take no longer.
    pub p99: f64,
    /// 999 of 1,000 take no longer.
    pub p999: f64,
    /// The longest.
    pub max: f64,
}

impl Spread {
    /// Of ascending values (nearest rank); zeros where there are none.
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

/// One moment.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Sample {
    /// Seconds from the start.
    pub at: f64,
    /// Bytes that running requests hold and queued ones need.
    pub demand_bytes: u64,
    /// Bytes that there are for caches.
    pub capacity_bytes: u64,
    /// Requests that wait for memory or for their first step.
    pub waiting: usize,
    /// Groups of several instances.
    pub groups: usize,
}

/// How often what happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Counts {
    /// Caches that were given up.
    pub recomputed: u64,
    /// Tokens that had to be prefilled again.
    pub recomputed_tokens: u64,
    /// Caches that went to host memory.
    pub swapped: u64,
    /// Caches that moved to another instance.
    pub migrated: u64,
    /// Copies of parameters that were dropped.
    pub drops: u64,
    /// Groups whose parameters were restored.
    pub restores: u64,
    /// The most instances that ever made a group.
    pub largest_group: usize,
    /// Bytes of caches that changed hands in exchanges.
    pub exchanged_bytes: u64,
    /// Bytes of parameters that were read again.
    pub restored_bytes: u64,
    /// Bytes of caches given out and taken back.
    pub allocated_bytes: u64,
    /// The latter.
    pub freed_bytes: u64,
    /// Steps or micro-batches.
    pub steps: u64,
}

/// A replay's result.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// Under which policy.
    pub policy: Policy,
    /// Requests that were answered.
    pub requests: usize,
    /// Tokens of their answers.
    pub output_tokens: u64,
    /// From the first arrival to the last token.
    pub seconds: f64,
    /// Seconds from arrival to the first token.
    pub ttft: Spread,
    /// Seconds between two tokens: of each answer of more than one token, from its first to its last, by one less than it has.
    pub tpot: Spread,
    /// The first by [`percentiles`].
    pub ttft_by_percentile: Vec<f64>,
    /// The second.
    pub tpot_by_percentile: Vec<f64>,
    /// The part of requests whose first token took more than five times the P50 of the policy with the least, and more than ten times;
    /// the paper's limits for chats and for summaries. 0 for a single policy's replay.
    pub late: [f64; 2],
    /// Bytes that running requests hold and queued ones need, over time.
    pub mean_demand_bytes: f64,
    /// The most that caches ever held.
    pub peak_held_bytes: u64,
    /// The part of the stages' time, while a pipeline had work, that they stood still between micro-batches.
    pub bubbles: f64,
    /// Seconds that an exchange took, of those there were.
    pub exchange_seconds: Spread,
    /// How often what happened.
    pub counts: Counts,
    /// The course, at a second's distance.
    pub series: Vec<Sample>,
    /// Seconds to the first token, ascending.
    #[serde(skip)]
    pub(super) first_tokens: Vec<f64>,
}

/// Tells how many of each policy's requests were late, by the least P50 of all.
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

/// 0 to 98, then in tenths to 99.9.
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
