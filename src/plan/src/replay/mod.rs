//! A trace replayed in virtual time: discrete events over the very scheduler that production would run.
//!
//! What is modelled: each prefill node takes one prompt at a time, first come, first served, for `T_prefill` of its uncached
//! tokens; each decode node has `BS_max` slots whose sequences advance a token a step, so that a sequence is one event and not one
//! a token; a cache crosses the link in pieces as its prefill goes on, sharing the rate with all others; decoding begins when all of
//! it has come. What is not: transfers within a cluster (RDMA), a prefill's growth with the length of the prefix that it goes on
//! from, failures. A shipped cache stays in the local cluster's prefix cache; the sender keeps the prompt's whole blocks, its tail is
//! dropped.

mod cache;
mod link;
mod outcome;
mod pool;
mod sim;
mod tally;

use std::time::Duration;

pub use link::LinkOptions;
pub use outcome::{Outcome, Peaks, Percentiles, Sample, Used};

use crate::model::{Deployment, Split};
use crate::route::{Decision, LinkState};
use crate::scheduler;
use crate::trace::Trace;
use crate::{Error, Result};

/// Who decides.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Policy {
    /// A threshold and a split that never change.
    Fixed {
        /// Whether prefixes are copied between the clusters.
        link: LinkState,
    },
    /// The scheduler.
    Scheduled(scheduler::Options),
}

/// When requests enter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrivals {
    /// As the trace has them.
    Traced,
    /// As fast as they are served: so many are in the system at any time. What comes out is the capacity.
    Saturated {
        /// Requests in the system.
        in_flight: usize,
    },
}

/// The link's rate from some time on, as a part of what it was built for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LinkChange {
    /// When.
    pub at: Duration,
    /// The part, 0 to 1.
    pub factor: f64,
}

/// What to replay on.
#[derive(Debug, Clone)]
pub struct Setup {
    /// The clusters and the link.
    pub deployment: Deployment,
    /// The threshold to begin with.
    pub threshold: u32,
    /// The split to begin with.
    pub split: Split,
    /// Who decides.
    pub policy: Policy,
    /// What the link is like.
    pub link: LinkOptions,
    /// How its rate changes, by time.
    pub changes: Vec<LinkChange>,
    /// Blocks of prefix cache of each cluster; `None` for any number.
    pub cache_blocks: Option<usize>,
    /// When requests enter.
    pub arrivals: Arrivals,
    /// Time that a node needs to take up its new role once its work is done.
    pub convert: Duration,
}

impl Setup {
    /// A plan's threshold and split under the scheduler, with the defaults of everything else: unlimited prefix caches, the trace's own
    /// arrivals, a minute to convert a node (its weights stay; what it holds drains, and its memory is laid out anew).
    #[must_use]
    pub fn new(deployment: Deployment, threshold: u32, split: Split) -> Self {
        Self {
            deployment,
            threshold,
            split,
            policy: Policy::Scheduled(scheduler::Options::default()),
            link: LinkOptions::default(),
            changes: Vec::new(),
            cache_blocks: None,
            arrivals: Arrivals::Traced,
            convert: Duration::from_secs(60),
        }
    }

    fn check(&self) -> Result<()> {
        self.deployment.check()?;
        let Split { prefill, decode } = self.split;
        let nodes = self.deployment.local_nodes;
        let refuse = |what: String| Err(Error::Deployment { what });
        if prefill + decode != nodes || decode == 0 {
            return refuse(format!(
                "{prefill} prefill and {decode} decode nodes; expected {nodes} together, and at least one to decode"
            ));
        }
        let away = self.deployment.prfaas_nodes > 0 && self.threshold < u32::MAX;
        if prefill == 0 && !(away && self.threshold == 0) {
            return refuse("no node prefills at home, but not every prompt is offloaded".into());
        }
        if self.deployment.prfaas_nodes == 0 && self.threshold < u32::MAX {
            return refuse("prompts are offloaded, but there is no PrfaaS node".into());
        }
        let LinkOptions {
            loss,
            connections,
            pieces,
            ..
        } = self.link;
        if !(0.0..1.0).contains(&loss) || connections == 0 || pieces == 0 {
            return refuse(
                "a link's loss must be from 0 to below 1, its connections and pieces at least 1"
                    .into(),
            );
        }
        if let Some(bad) = self
            .changes
            .iter()
            .find(|change| !(0.0..=1.0).contains(&change.factor))
        {
            return refuse(format!(
                "a link's rate changes to {} of what it was; expected 0 to 1",
                bad.factor
            ));
        }
        if self.changes.last().is_some_and(|last| last.factor == 0.0) {
            return refuse(
                "the link stands still for ever; its last change must bring it back".into(),
            );
        }
        if matches!(self.arrivals, Arrivals::Saturated { in_flight: 0 }) {
            return refuse("no request may enter; expected at least 1 in flight".into());
        }
        Ok(())
    }
}

/// A request when its answer is finished.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Served {
    /// Its place in the trace.
    pub index: usize,
    /// What was decided for it.
    pub decision: Decision,
    /// When it arrived, or was let in.
    pub arrived: Duration,
    /// When its first token was there.
    pub first_token: Duration,
    /// When its last one was.
    pub done: Duration,
}

/// Replays a trace; `served` is told of every request as it ends.
///
/// # Errors
/// A setup that cannot serve, or a trace without requests.
pub fn run(trace: &Trace, setup: &Setup, served: &mut dyn FnMut(&Served)) -> Result<Outcome> {
    setup.check()?;
    if trace.requests().is_empty() {
        return Err(Error::NoRequests);
    }
    Ok(sim::Simulation::new(trace, setup).run(served))
}
