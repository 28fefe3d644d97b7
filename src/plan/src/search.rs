//! Equations (7) and (8): the threshold and the split that serve most.
//!
//! Every threshold that cuts the lengths differently is tried with every split: no shape of the curves is taken for granted, and
//! with running sums one try costs four reads of a curve.

use crate::lengths::{Cut, Lengths};
use crate::model::{Demand, Deployment, Split, Stages, stages};

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
    let with = |prefill| {
        let split = Split {
            prefill,
            decode: nodes - prefill,
        };
        best_threshold(deployment, demand, split)
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
    let lengths = demand.lengths;
    let at = |threshold, cut: Cut| Found {
        threshold,
        split,
        stages: stages(deployment, demand.output_tokens, cut, split),
    };
    // Nobody leaves.
    let mut best = at(u32::MAX, lengths.cut_at(lengths.count()));
    if deployment.prfaas_nodes == 0 {
        return best;
    }
    for (threshold, short) in lengths.cuts() {
        let found = at(threshold, lengths.cut_at(short));
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
    cut: Cut,
    backlog: Backlog,
    requests: f64,
) -> f64 {
    let (out, kept) = (requests * cut.share_long, requests * (1.0 - cut.share_long));
    let shared = |work: f64, by: f64| if work > 0.0 { work / by } else { 0.0 };
    let prfaas = backlog.prfaas_seconds + out * deployment.prfaas.seconds(cut.long);
    let link = backlog.link_bytes + out * deployment.prfaas.bytes(cut.long);
    let local = backlog.local_seconds + kept * deployment.local.seconds(cut.short);
    shared(prfaas, f64::from(deployment.prfaas_nodes))
        .max(shared(8.0 * link, deployment.link_bits_per_second))
        .max(shared(local, f64::from(split.prefill)))
}

/// The threshold under which backlog and the next `requests` are done soonest, and when: the short timescale's search.
#[must_use]
pub fn soonest(
    deployment: &Deployment,
    lengths: &Lengths,
    split: Split,
    backlog: Backlog,
    requests: f64,
) -> (u32, f64) {
    let of = |cut| finish_seconds(deployment, split, cut, backlog, requests);
    let mut best = (u32::MAX, of(lengths.cut_at(lengths.count())));
    for (threshold, short) in lengths.cuts() {
        let seconds = of(lengths.cut_at(short));
        if seconds < best.1 {
            best = (threshold, seconds);
        }
    }
    best
}
