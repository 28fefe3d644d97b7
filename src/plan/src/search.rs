//! Equations (7) and (8): the threshold and the split that serve most.
//!
//! Every threshold that cuts the lengths differently is tried with every split: no shape of the curves is taken for granted, and
//! with running sums one try costs four reads of a curve.

use crate::lengths::Lengths;
use crate::model::{Averages, Costs, Demand, Deployment, Split, Stages, Work, stages};

/// What a search found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Found {
    /// Prompts with more uncached tokens than this are offloaded, `t`.
    pub threshold: u32,
    /// The local cluster's nodes.
    pub split: Split,
    /// What comes of it.
    pub stages: Stages,
}

impl Found {
    /// Whether it serves more than another; of equals the one whose prefill has more to spare, then the one that sends less.
    fn beats(&self, other: &Self) -> bool {
        let key = |found: &Self| (found.stages.throughput, found.stages.prefill_bound);
        key(self) > key(other)
    }
}

/// The best threshold and split of a deployment.
///
/// A deployment without a PrfaaS cluster keeps everything (`threshold` is `u32::MAX`).
#[must_use]
pub fn best(deployment: &Deployment, demand: Demand<'_>) -> Found {
    let nodes = deployment.local_nodes;
    let costs = Costs::new(deployment, demand.lengths, demand.averages);
    let with = |prefill| {
        let split = Split {
            prefill,
            decode: nodes - prefill,
        };
        cheapest(deployment, demand, &costs, split)
    };
    let first = with(0);
    (1..nodes).map(with).fold(
        first,
        |best, found| {
            if found.beats(&best) { found } else { best }
        },
    )
}

/// The best threshold at a given split.
#[must_use]
pub fn best_threshold(deployment: &Deployment, demand: Demand<'_>, split: Split) -> Found {
    let costs = Costs::new(deployment, demand.lengths, demand.averages);
    cheapest(deployment, demand, &costs, split)
}

fn cheapest(deployment: &Deployment, demand: Demand<'_>, costs: &Costs<'_>, split: Split) -> Found {
    let lengths = demand.lengths;
    let at = |threshold, short| Found {
        threshold,
        split,
        stages: stages(
            deployment,
            demand.output_tokens,
            &costs.at_cut(short),
            split,
        ),
    };
    // Nobody leaves.
    let mut best = at(u32::MAX, lengths.count());
    if deployment.prfaas_nodes == 0 {
        return best;
    }
    for (threshold, short) in lengths.cuts() {
        let found = at(threshold, short);
        if found.beats(&best) {
            best = found;
        }
    }
    best
}

/// What each stage has still to do before it turns to new requests.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Backlog {
    /// Node-seconds of prefill that wait at the PrfaaS cluster.
    pub prfaas_seconds: f64,
    /// Node-seconds of prefill that wait at the local cluster.
    pub local_seconds: f64,
    /// Bytes that wait for the link.
    pub link_bytes: f64,
}

/// When the last of the three prefill stages has done its backlog and its part of the next `requests`, in seconds, at one cut.
///
/// Without a backlog the threshold that makes it least is that of equation (7): each stage's time is `requests` over its bound in (6).
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

/// What the short timescale found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Soonest {
    /// The threshold under which backlog and the next requests are done soonest.
    pub threshold: u32,
    /// When that is, in seconds.
    pub seconds: f64,
    /// When it would be under the present threshold.
    pub present_seconds: f64,
}

/// The short timescale's search, over what recent prompts really cost ([`Averages::OfWork`]).
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
