//! Equations (7) and (8): the threshold and the split with the highest throughput.
//!
//! Every threshold with a different cut is tried with every split, so that no shape of the curves is assumed; with running
//! sums one evaluation reads a curve four times. A trace whose lengths change is searched window by window.

use crate::lengths::Lengths;
use crate::model::{Averages, Costs, Demand, Deployment, Split, Stages, Work, stages};

/// The result of a search.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Found {
    /// Prompts with more uncached tokens than this are offloaded, `t`.
    pub threshold: u32,
    /// The local cluster's nodes.
    pub split: Split,
    /// The throughput of the stages, over all lengths at once.
    pub stages: Stages,
    /// Requests per second: `stages.throughput`, or less if the lengths change from window to window.
    pub throughput: f64,
}

impl Found {
    /// Whether it has a higher throughput; if equal, whether its prefill has more reserve, then whether it sends less.
    fn beats(&self, other: &Self) -> bool {
        let key = |found: &Self| (found.throughput, found.stages.prefill_bound);
        key(self) > key(other)
    }
}

/// Consecutive requests of a trace that are in the system at the same time. Idle time of a stage in one window is not
/// available in another, so that the time of a trace is the sum of its windows' times.
#[derive(Debug, Clone, PartialEq)]
pub struct Window {
    /// Uncached prompt lengths.
    pub lengths: Lengths,
    /// Mean tokens of an answer.
    pub output_tokens: f64,
}

/// Windows with the costs of their lengths in a deployment.
#[derive(Debug)]
pub struct Course<'a> {
    deployment: &'a Deployment,
    windows: Vec<(Costs<'a>, f64)>,
}

impl<'a> Course<'a> {
    /// The costs of windows in a deployment.
    #[must_use]
    pub fn new(deployment: &'a Deployment, windows: &'a [Window], averages: Averages) -> Self {
        let costs = |window: &'a Window| {
            let costs = Costs::new(deployment, &window.lengths, averages);
            (costs, window.output_tokens)
        };
        Self {
            deployment,
            windows: windows.iter().map(costs).collect(),
        }
    }

    /// Requests per second over all windows: their number divided by the sum of each window's seconds at its slowest stage.
    /// `None` without windows.
    #[must_use]
    pub fn throughput(&self, threshold: u32, split: Split) -> Option<f64> {
        let (mut requests, mut seconds) = (0.0, 0.0);
        for (costs, output_tokens) in &self.windows {
            let work = costs.at(threshold);
            let count = costs.lengths().count() as f64;
            requests += count;
            seconds += count / stages(self.deployment, *output_tokens, &work, split).throughput;
        }
        (requests > 0.0).then(|| requests / seconds)
    }
}

/// The best threshold and split of a deployment for lengths that do not change.
///
/// A deployment without a PrfaaS cluster offloads nothing (`threshold` is `u32::MAX`).
#[must_use]
pub fn best(deployment: &Deployment, demand: Demand<'_>) -> Found {
    let none = best_threshold(
        deployment,
        demand,
        Split {
            prefill: 0,
            decode: deployment.local_nodes,
        },
    );
    by_split(deployment, demand, &[])
        .into_iter()
        .fold(
            none,
            |best, found| if found.beats(&best) { found } else { best },
        )
}

/// The best threshold of every split, by ascending number of prefill nodes: over all lengths at once, or, with windows of a
/// trace, the one with the highest throughput over all windows.
#[must_use]
pub fn by_split(deployment: &Deployment, demand: Demand<'_>, windows: &[Window]) -> Vec<Found> {
    let nodes = deployment.local_nodes;
    let search = Search::new(deployment, demand, windows);
    let with = |prefill| {
        search.best_at(Split {
            prefill,
            decode: nodes - prefill,
        })
    };
    (0..nodes).map(with).collect()
}

/// The best threshold at a given split.
#[must_use]
pub fn best_threshold(deployment: &Deployment, demand: Demand<'_>, split: Split) -> Found {
    Search::new(deployment, demand, &[]).best_at(split)
}

struct Search<'a> {
    deployment: &'a Deployment,
    demand: Demand<'a>,
    costs: Costs<'a>,
    course: Course<'a>,
}

impl<'a> Search<'a> {
    fn new(deployment: &'a Deployment, demand: Demand<'a>, windows: &'a [Window]) -> Self {
        Self {
            deployment,
            demand,
            costs: Costs::new(deployment, demand.lengths, demand.averages),
            course: Course::new(deployment, windows, demand.averages),
        }
    }

    fn at(&self, split: Split, threshold: u32, short: usize) -> Found {
        let work = self.costs.at_cut(short);
        let stages = stages(self.deployment, self.demand.output_tokens, &work, split);
        Found {
            threshold,
            split,
            stages,
            throughput: self
                .course
                .throughput(threshold, split)
                .unwrap_or(stages.throughput),
        }
    }

    fn best_at(&self, split: Split) -> Found {
        let lengths = self.demand.lengths;
        // Nothing is offloaded.
        let mut best = self.at(split, u32::MAX, lengths.count());
        if self.deployment.prfaas_nodes == 0 {
            return best;
        }
        for (threshold, short) in lengths.cuts() {
            let found = self.at(split, threshold, short);
            if found.beats(&best) {
                best = found;
            }
        }
        best
    }
}

/// The backlog of each stage before new requests.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Backlog {
    /// Node-seconds of prefill queued at the PrfaaS cluster.
    pub prfaas_seconds: f64,
    /// Node-seconds of prefill queued at the local cluster.
    pub local_seconds: f64,
    /// Bytes queued at the link.
    pub link_bytes: f64,
}

/// The time in seconds at which the last of the three prefill stages has finished its backlog and its part of the next
/// `requests`, at one cut.
///
/// Without a backlog the threshold that minimises it is that of equation (7): each stage's time is `requests` divided by its
/// bound in (6).
#[must_use]
pub fn finish_seconds(
    deployment: &Deployment,
    split: Split,
    work: &Work,
    backlog: Backlog,
    requests: f64,
) -> f64 {
    let share = work.cut.share_long;
    let (out, kept) = (requests * share, requests * (1.0 - share));
    let shared = |work: f64, by: f64| if work > 0.0 { work / by } else { 0.0 };
    let prfaas = backlog.prfaas_seconds + out * work.prfaas_seconds;
    let link = backlog.link_bytes + out * work.prfaas_bytes;
    let local = backlog.local_seconds + kept * work.local_seconds;
    shared(prfaas, f64::from(deployment.prfaas_nodes))
        .max(shared(8.0 * link, deployment.link_bits_per_second))
        .max(shared(local, f64::from(split.prefill)))
}

/// The result of the short timescale's search.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Soonest {
    /// The threshold with which backlog and the next requests are finished soonest.
    pub threshold: u32,
    /// The time in seconds at which they are finished.
    pub seconds: f64,
    /// The same with the current threshold.
    pub present_seconds: f64,
}

/// The short timescale's search, over the actual costs of recent prompts ([`Averages::OfWork`]).
#[must_use]
pub fn soonest(
    deployment: &Deployment,
    lengths: &Lengths,
    split: Split,
    backlog: Backlog,
    requests: f64,
    present: u32,
) -> Soonest {
    let costs = Costs::new(deployment, lengths, Averages::OfWork);
    let of = |work: Work| finish_seconds(deployment, split, &work, backlog, requests);
    let mut best = Soonest {
        threshold: u32::MAX,
        seconds: of(costs.at_cut(lengths.count())),
        present_seconds: of(costs.at(present)),
    };
    for (threshold, short) in lengths.cuts() {
        let seconds = of(costs.at_cut(short));
        if seconds < best.seconds {
            (best.threshold, best.seconds) = (threshold, seconds);
        }
    }
    best
}
