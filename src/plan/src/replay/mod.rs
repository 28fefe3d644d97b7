//! A trace replayed in virtual time: discrete events, with the scheduler that would run in production.
//!
//! Modelled are: prefill nodes that process one prompt at a time, first come, first served, for `T_prefill` of its uncached
//! tokens; decode nodes with `BS_max` slots whose sequences advance a token per step, so that a sequence is a single event;
//! caches that are sent over the link in pieces during their prefill and share its rate with all others; decoding begins when
//! the whole cache has arrived. Not modelled are: transfers within a cluster (RDMA), a prefill's dependence on the length of
//! its cached prefix, failures. A cache that was sent stays in the local cluster's prefix cache; the sender keeps the
//! prompt's whole blocks and drops the partial one.

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

/// How threshold and split are decided.
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

/// When requests arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrivals {
    /// At the trace's times.
    Traced,
    /// As fast as they are served: the number of requests in the system is constant. The throughput is then the capacity.
    Saturated {
        /// Requests in the system.
        in_flight: usize,
    },
}

/// The link's rate from some time on, as a fraction of its nominal rate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LinkChange {
    /// The time.
    pub at: Duration,
    /// The fraction, 0 to 1.
    pub factor: f64,
}

/// The setup of a replay.
#[derive(Debug, Clone)]
pub struct Setup {
    /// The clusters and the link.
    pub deployment: Deployment,
    /// The threshold at the start.
    pub threshold: u32,
    /// The split at the start.
    pub split: Split,
    /// How threshold and split are decided.
    pub policy: Policy,
    /// The properties of the link.
    pub link: LinkOptions,
    /// Changes of its rate, by time.
    pub changes: Vec<LinkChange>,
    /// Blocks of prefix cache per cluster; `None` for no limit.
    pub cache_blocks: Option<usize>,
    /// When requests arrive.
    pub arrivals: Arrivals,
    /// Time that a node needs to change its role after its work is done.
    pub convert: Duration,
}

impl Setup {
    /// A plan's threshold and split with the scheduler, and defaults for everything else: unlimited prefix caches, the
    /// trace's own arrivals, a minute to convert a node (its weights stay; running work is finished, and the memory is
    /// allocated again).
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
            return refuse(
                "there is no local prefill node, but not every prompt is offloaded".into(),
            );
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
            return refuse("the link never runs again; its last change must be above 0".into());
        }
        if matches!(self.arrivals, Arrivals::Saturated { in_flight: 0 }) {
            return refuse("there are 0 requests in flight; expected at least 1".into());
        }
        Ok(())
    }
}

/// A request whose answer is finished.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Served {
    /// Its index in the trace.
    pub index: usize,
    /// Its routing decision.
    pub decision: Decision,
    /// When it arrived, or was admitted.
    pub arrived: Duration,
    /// When its first token was available.
    pub first_token: Duration,
    /// When its last token was available.
    pub done: Duration,
}

/// Replays a trace; `served` is called for every request when it ends.
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
