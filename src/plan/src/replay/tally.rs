//! Counters of a replay, and the results computed from them.

use std::time::Duration;

use super::outcome::{Outcome, Peaks, Percentiles, Series, Used, curve};
use super::pool::Pool;
use super::sim::Simulation;
use crate::scheduler::Role;

#[derive(Debug)]
pub(super) struct Tally {
    pub(super) ttft: Vec<f64>,
    pub(super) offloaded: usize,
    pub(super) prompt_tokens: u64,
    pub(super) prefilled_tokens: u64,
    pub(super) shipped_bytes: u64,
    pub(super) copied_home_bytes: u64,
    pub(super) copied_out_bytes: u64,
    pub(super) link_peak: f64,
    pub(super) tenth: Duration,
    pub(super) nine_tenths: Duration,
    pub(super) conversions: Vec<(f64, Role)>,
    pub(super) series: Series,
}

impl Tally {
    pub(super) fn new(requests: usize) -> Self {
        Self {
            ttft: Vec::with_capacity(requests),
            offloaded: 0,
            prompt_tokens: 0,
            prefilled_tokens: 0,
            shipped_bytes: 0,
            copied_home_bytes: 0,
            copied_out_bytes: 0,
            link_peak: 0.0,
            tenth: Duration::ZERO,
            nine_tenths: Duration::ZERO,
            conversions: Vec::new(),
            series: Series::new(),
        }
    }
}

impl Simulation<'_> {
    pub(super) fn outcome(mut self) -> Outcome {
        let now = self.now;
        self.out.look(now);
        let (threshold, split, _) = self.standing();
        let seconds = now.as_secs_f64();
        let count = self.jobs.len();
        let steady = (self.tally.nine_tenths - self.tally.tenth).as_secs_f64();
        let served = (9 * count).div_ceil(10) - count.div_ceil(10);
        let used = |pool: &Pool| match pool.offered_seconds(now) {
            offered if offered > 0.0 => pool.worked.as_secs_f64() / offered,
            _ => 0.0,
        };
        let bytes = self.out.passed;
        let again = self.setup.link.loss / (1.0 - self.setup.link.loss);
        let built = self.setup.deployment.link_bits_per_second;
        let each = |pool: &Pool, nodes: u32| pool.deepest / f64::from(nodes.max(1));
        let mut tally = self.tally;
        tally.ttft.sort_by(f64::total_cmp);
        Outcome {
            requests: self.done,
            seconds,
            throughput: if steady > 0.0 {
                served as f64 / steady
            } else {
                count as f64 / seconds
            },
            ttft: Percentiles::of_sorted(&tally.ttft),
            ttft_by_percentile: curve(&tally.ttft),
            offloaded: tally.offloaded,
            prompt_tokens: tally.prompt_tokens,
            cached_tokens: tally.prompt_tokens - tally.prefilled_tokens,
            prefilled_tokens: tally.prefilled_tokens,
            shipped_bytes: tally.shipped_bytes,
            copied_home_bytes: tally.copied_home_bytes,
            copied_out_bytes: tally.copied_out_bytes,
            retransmitted_bytes: (bytes * again) as u64,
            egress_bits_per_second: 8.0 * bytes / seconds,
            used: Used {
                prfaas: used(&self.prfaas),
                link: 8.0 * bytes / (built * seconds),
                local_prefill: used(&self.local),
                decode: used(&self.decode),
            },
            peaks: Peaks {
                prfaas: self.prfaas.longest,
                prfaas_seconds: each(&self.prfaas, self.setup.deployment.prfaas_nodes),
                local_prefill: self.local.longest,
                local_prefill_seconds: each(&self.local, self.setup.split.prefill),
                link_bytes: tally.link_peak as u64,
                decode: self.decode.longest,
            },
            threshold,
            split,
            conversions: tally.conversions,
            series: tally.series.into_samples(),
        }
    }
}
