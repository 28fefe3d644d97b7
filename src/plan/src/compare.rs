//! A trace replayed in all three ways, and what was found held against fixed thresholds and splits.

use std::time::Duration;

use serde::Serialize;

use crate::fit::capacity;
use crate::model::{Deployment, Split};
use crate::plan::{Task, Way, setup_of, some_threshold};
use crate::replay::{self, Arrivals, Policy, Setup};
use crate::search::Found;
use crate::trace::Trace;
use crate::{Error, Result, scheduler};

/// A trace replayed in one way.
#[derive(Debug, Clone, Serialize)]
pub struct Replayed {
    /// Which way.
    pub way: Way,
    /// The threshold that it began with.
    pub planned_threshold: Option<u32>,
    /// The split that it began with.
    pub planned_split: Split,
    /// The plan's throughput; of a trace, what its replay at capacity serves.
    pub planned_throughput: f64,
    /// What came of it.
    pub outcome: replay::Outcome,
}

/// How to replay in all ways.
#[derive(Debug, Clone)]
pub struct Replays {
    /// The scheduler's options.
    pub scheduler: scheduler::Options,
    /// How the link's rate changes.
    pub changes: Vec<replay::LinkChange>,
    /// Blocks of prefix cache of each cluster.
    pub cache_blocks: Option<usize>,
    /// When requests enter.
    pub arrivals: Arrivals,
    /// Time to convert a node.
    pub convert: Duration,
}

impl Replays {
    /// A way's setup under these options.
    #[must_use]
    pub fn setup(&self, task: &Task, way: Way, deployment: &Deployment, found: &Found) -> Setup {
        let mut setup = setup_of(way, deployment, found, task.link);
        if let Policy::Scheduled(options) = &mut setup.policy {
            *options = self.scheduler;
        }
        Setup {
            changes: self.changes.clone(),
            cache_blocks: self.cache_blocks,
            arrivals: self.arrivals,
            convert: self.convert,
            ..setup
        }
    }

    /// Replays a trace in all ways as they were found for `task`.
    ///
    /// # Errors
    /// As [`replay::run`].
    pub fn run(
        &self,
        trace: &Trace,
        task: &Task,
        ways: &[(Way, Deployment, Found)],
    ) -> Result<Vec<Replayed>> {
        let mut replayed = Vec::new();
        for (way, deployment, found) in ways {
            let setup = self.setup(task, *way, deployment, found);
            replayed.push(Replayed {
                way: *way,
                planned_threshold: some_threshold(found),
                planned_split: found.split,
                planned_throughput: found.throughput,
                outcome: replay::run(trace, &setup, &mut |_| {})?,
            });
        }
        Ok(replayed)
    }
}

/// One fixed threshold and split, replayed at capacity.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Tried {
    /// The threshold.
    pub threshold: u32,
    /// The split.
    #[serde(flatten)]
    pub split: Split,
    /// Requests a second.
    pub throughput: f64,
}

/// What a sweep of fixed thresholds and splits shows about the one that was found.
#[derive(Debug, Clone, Serialize)]
pub struct Sweep {
    /// What the search found, held fixed.
    pub found: Tried,
    /// The scheduler, which began with it.
    pub scheduled: Tried,
    /// The best of all that were tried.
    pub best: Tried,
    /// All of them, by split and threshold.
    pub tried: Vec<Tried>,
}

/// Replays a trace at capacity under `setup`'s threshold and split, under the scheduler, and under every split with `points` thresholds.
///
/// # Errors
/// As [`replay::run`].
pub fn sweep(trace: &Trace, setup: &Setup, in_flight: usize, points: u32) -> Result<Sweep> {
    let lengths = trace.uncached()?;
    if setup.deployment.prfaas_nodes == 0 {
        return Err(Error::Deployment {
            what: "a sweep of thresholds needs a PrfaaS cluster".into(),
        });
    }
    let at = |threshold, split| {
        let throughput = capacity(trace, setup, threshold, split, in_flight)?;
        Ok::<_, Error>(Tried {
            threshold,
            split,
            throughput,
        })
    };
    let found = at(setup.threshold, setup.split)?;
    let saturated = Setup {
        arrivals: Arrivals::Saturated { in_flight },
        ..setup.clone()
    };
    let scheduled = Tried {
        throughput: replay::run(trace, &saturated, &mut |_| {})?.throughput,
        ..found
    };
    let mut thresholds: Vec<u32> = (0..=points)
        .map(|i| lengths.quantile(f64::from(i) / f64::from(points.max(1))))
        .collect();
    thresholds.dedup();
    let nodes = setup.deployment.local_nodes;
    let mut tried = vec![found];
    for prefill in 1..nodes {
        let split = Split {
            prefill,
            decode: nodes - prefill,
        };
        for threshold in &thresholds {
            tried.push(at(*threshold, split)?);
        }
    }
    let naive = Split {
        prefill: 0,
        decode: nodes,
    };
    tried.push(at(0, naive)?);
    let best = tried.iter().copied().fold(found, |best, one| {
        if one.throughput > best.throughput {
            one
        } else {
            best
        }
    });
    Ok(Sweep {
        found,
        scheduled,
        best,
        tried,
    })
}
