//! Replays a trace in three configurations, and compares the plan with fixed thresholds and splits.

use std::time::Duration;

use serde::Serialize;

use crate::fit::capacity;
use crate::model::{Deployment, Split};
use crate::plan::{Task, Way, setup_of, some_threshold};
use crate::replay::{self, Arrivals, Policy, Setup};
use crate::search::Found;
use crate::trace::Trace;
use crate::{Error, Result, scheduler};

/// The replay of a trace in one configuration.
#[derive(Debug, Clone, Serialize)]
pub struct Replayed {
    /// The configuration.
    pub way: Way,
    /// The threshold at the start.
    pub planned_threshold: Option<u32>,
    /// The split at the start.
    pub planned_split: Split,
    /// The plan's throughput; for a trace, the throughput of its replay at capacity.
    pub planned_throughput: f64,
    /// The results.
    pub outcome: replay::Outcome,
}

/// Options for replays in all configurations.
#[derive(Debug, Clone)]
pub struct Replays {
    /// The scheduler's options.
    pub scheduler: scheduler::Options,
    /// Changes of the link's rate.
    pub changes: Vec<replay::LinkChange>,
    /// Blocks of prefix cache per cluster.
    pub cache_blocks: Option<usize>,
    /// When requests arrive.
    pub arrivals: Arrivals,
    /// Time to convert a node.
    pub convert: Duration,
}

impl Replays {
    /// A configuration's setup with these options.
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

    /// Replays a trace in all configurations that were planned for `task`.
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
    /// Requests per second.
    pub throughput: f64,
}

/// A sweep of fixed thresholds and splits, to compare the plan with.
#[derive(Debug, Clone, Serialize)]
pub struct Sweep {
    /// The plan, held fixed.
    pub found: Tried,
    /// The scheduler, starting from the plan.
    pub scheduled: Tried,
    /// The best of all that were tried.
    pub best: Tried,
    /// All that were tried, by split and threshold.
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
