//! Threshold and split for a trace, whose lengths change and whose prefixes are shared.
//!
//! Equation (7) uses the lengths of the whole trace, so that idle time in one minute counts for another. In a real system
//! queues shift work only as far as they are long. So the equation is solved for the whole trace, for long windows and for
//! windows of as many requests as are in the system at a time, at every split; each solution is replayed at capacity, and the
//! one with the highest throughput is used.

use crate::model::{Deployment, Split};
use crate::plan::{Task, Way};
use crate::replay::{self, Arrivals, Policy, Setup};
use crate::route::LinkState;
use crate::search::{self, Found};
use crate::trace::Trace;
use crate::{Error, Result};

/// Number of short windows in a long window: queues that last for about eight answers.
const LONG: usize = 8;

/// The throughput of a replay with a fixed threshold and split at capacity: requests per second with `in_flight` requests in
/// the system at any time.
///
/// # Errors
/// As [`replay::run`].
pub fn capacity(
    trace: &Trace,
    setup: &Setup,
    threshold: u32,
    split: Split,
    in_flight: usize,
) -> Result<f64> {
    let setup = Setup {
        threshold,
        split,
        policy: Policy::Fixed {
            link: LinkState::Ample,
        },
        arrivals: Arrivals::Saturated { in_flight },
        ..setup.clone()
    };
    Ok(replay::run(trace, &setup, &mut |_| {})?.throughput)
}

impl Task {
    /// As [`Task::ways`], for a trace with this number of requests in the system at any time; a configuration's throughput is
    /// that of its replay.
    ///
    /// # Errors
    /// Clusters that cannot serve in any configuration, or a trace without requests.
    pub fn ways_of(
        &self,
        trace: &Trace,
        in_flight: usize,
    ) -> Result<Vec<(Way, Deployment, Found)>> {
        let mut ways = self.ways()?;
        for (way, deployment, found) in &mut ways {
            let mut tried = vec![*found];
            if *way != Way::Naive {
                tried.extend(self.answers(trace, deployment, in_flight)?);
            }
            *found = self.most(trace, deployment, in_flight, tried)?;
        }
        Ok(ways)
    }

    /// The solutions of equation (7) at every split, over the whole trace and over windows.
    fn answers(
        &self,
        trace: &Trace,
        deployment: &Deployment,
        in_flight: usize,
    ) -> Result<Vec<Found>> {
        let task = Self {
            deployment: deployment.clone(),
            ..self.clone()
        };
        let effective = task.effective();
        let mut answers = search::by_split(&effective, self.demand(), &[]);
        for requests in [LONG * in_flight, in_flight] {
            let windows = trace.windows(requests)?;
            answers.extend(search::by_split(&effective, self.demand(), &windows));
        }
        // Without local prefill, only a threshold that offloads every prompt serves all.
        answers.retain(|answer| answer.throughput > 0.0);
        answers.sort_by_key(|answer| (answer.split.prefill, answer.threshold));
        answers.dedup_by_key(|answer| (answer.split, answer.threshold));
        Ok(answers)
    }

    fn most(
        &self,
        trace: &Trace,
        deployment: &Deployment,
        in_flight: usize,
        tried: Vec<Found>,
    ) -> Result<Found> {
        let mut best: Option<Found> = None;
        for mut found in tried {
            let setup = Setup {
                link: self.link,
                ..Setup::new(deployment.clone(), found.threshold, found.split)
            };
            found.throughput = capacity(trace, &setup, found.threshold, found.split, in_flight)?;
            if best.is_none_or(|best| found.throughput > best.throughput) {
                best = Some(found);
            }
        }
        best.ok_or(Error::NoRequests)
    }
}
