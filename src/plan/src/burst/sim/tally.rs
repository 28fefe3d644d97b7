//! Counters of a replay, and the results computed from them.

use super::super::outcome::{Counts, Outcome, Sample, Spread, curve};
use super::{Job, Simulation};

#[derive(Debug)]
pub(super) struct Tally {
    ttft: Vec<f64>,
    tpot: Vec<f64>,
    output_tokens: u64,
    pub(super) counts: Counts,
    /// Seconds of each exchange.
    pub(super) exchanges: Vec<f64>,
    /// Seconds that stages of pipelines worked, and were idle between micro-batches.
    pub(super) busy: f64,
    pub(super) idle: f64,
    demand: f64,
    samples: u64,
    series: Vec<Sample>,
}

impl Tally {
    pub(super) fn new(requests: usize) -> Self {
        Self {
            ttft: Vec::with_capacity(requests),
            tpot: Vec::with_capacity(requests),
            output_tokens: 0,
            counts: Counts::default(),
            exchanges: Vec::new(),
            busy: 0.0,
            idle: 0.0,
            demand: 0.0,
            samples: 0,
            series: Vec::new(),
        }
    }

    pub(super) fn largest(&mut self, members: usize) {
        self.counts.largest_group = self.counts.largest_group.max(members);
    }

    pub(super) fn answered(&mut self, job: &Job, now: f64) {
        self.ttft.push(job.first_token - job.arrived);
        self.output_tokens += u64::from(job.done);
        if job.output > 1 {
            self.tpot
                .push((now - job.first_token) / f64::from(job.output - 1));
        }
    }

    pub(super) fn sample(&mut self, sample: Sample) {
        self.demand += sample.demand_bytes as f64;
        self.samples += 1;
        if self
            .series
            .last()
            .is_none_or(|last| sample.at >= last.at + 1.0)
        {
            self.series.push(sample);
        }
    }
}

impl Simulation<'_> {
    pub(super) fn outcome(self) -> Outcome {
        let mut tally = self.tally;
        tally.ttft.sort_by(f64::total_cmp);
        tally.tpot.sort_by(f64::total_cmp);
        tally.exchanges.sort_by(f64::total_cmp);
        tally.counts.allocated_bytes = self.memory.allocated;
        tally.counts.freed_bytes = self.memory.freed;
        let stages = tally.busy + tally.idle;
        Outcome {
            policy: self.setup.policy,
            requests: self.finished,
            output_tokens: tally.output_tokens,
            seconds: self.now,
            ttft: Spread::of_sorted(&tally.ttft),
            tpot: Spread::of_sorted(&tally.tpot),
            ttft_by_percentile: curve(&tally.ttft),
            tpot_by_percentile: curve(&tally.tpot),
            late: [0.0; 2],
            mean_demand_bytes: tally.demand / tally.samples.max(1) as f64,
            peak_held_bytes: self.memory.peak,
            bubbles: if stages > 0.0 {
                tally.idle / stages
            } else {
                0.0
            },
            exchange_seconds: Spread::of_sorted(&tally.exchanges),
            counts: tally.counts,
            series: tally.series,
            first_tokens: tally.ttft,
        }
    }
}
