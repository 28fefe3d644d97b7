//! The policy of two clusters as Dynamo's worker selection: which worker prefills a prompt.
//!
//! A prompt with more uncached tokens than the threshold is prefilled by the PrfaaS cluster, any other by the local one; within the
//! cluster by the worker that will be done with it first. `kimi_linear_plan`'s scheduler moves the threshold ([`controller`]). The policy
//! learns from [`members`] which worker is where. [`picker`] is all that knows of Dynamo.
//!
//! A prefix is not copied from cluster to cluster by itself. Where the plan would copy a prefix from the PrfaaS cluster to the local one,
//! the prompt is prefilled where the prefix is, and its cache goes over the link all the same.

pub mod controller;
pub mod journal;
pub mod members;
pub mod picker;
pub mod planner;
pub mod threshold;

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kimi_linear_plan::route::{Cached, Site};
use kimi_linear_plan::scheduler::{LinkStatus, Role, Telemetry};

use self::controller::Controller;
use self::journal::{Decided, Journal, Reason, Sums};
use self::members::{Members, Nodes};
use self::planner::Planner;
pub use self::threshold::Threshold;

/// A worker that may prefill a prompt.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Dynamo's id of the worker.
    pub worker: u64,
    /// Its cluster.
    pub site: Site,
    /// Leading tokens of the prompt that it has cached.
    pub cached: u32,
    /// Prompt tokens that it has to compute first.
    pub load: u64,
    /// Seconds that it needs to prefill a token; `None` for what the profile says.
    pub seconds_per_token: Option<f64>,
}

/// What is known of a worker's queue.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Queue {
    /// Prompt tokens that wait or are computed, when it was last seen.
    pub tokens: u64,
    /// Node-seconds until they are done, now.
    pub seconds: f64,
}

/// Counters of the clusters.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Told {
    /// Bytes that the link out of the PrfaaS cluster has delivered.
    pub sent_bytes: u64,
    /// Bytes that were sent again.
    pub retransmitted_bytes: u64,
    /// Bytes that wait at the link.
    pub queued_bytes: u64,
    /// Node-seconds of prefill that wait at the PrfaaS cluster, if its workers tell.
    pub prfaas_queue_seconds: Option<f64>,
    /// Node-seconds of prefill that wait at the local cluster, if its workers tell.
    pub local_queue_seconds: Option<f64>,
}

/// The policy's state at one moment.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// What the threshold follows.
    pub setting: Threshold,
    /// The threshold; `None` if nothing is offloaded.
    pub threshold: Option<u32>,
    /// The link, once there are workers.
    pub link: Option<LinkStatus>,
    /// Sums over all decisions.
    pub sums: Sums,
    /// Queues by worker.
    pub queues: HashMap<u64, Queue>,
}

#[derive(Debug)]
struct State {
    setting: Threshold,
    controller: Controller,
    journal: Journal,
    /// Prompt tokens of each worker when it was last seen, and when it will be done with them.
    queues: HashMap<u64, (u64, Instant)>,
}

/// The policy. All frontend tasks and Dynamo's routers share it.
#[derive(Debug)]
pub struct Policy {
    members: Arc<Members>,
    state: Mutex<State>,
}

fn other(site: Site) -> Site {
    match site {
        Site::Local => Site::Prfaas,
        Site::Prfaas => Site::Local,
    }
}

impl State {
    fn threshold(&self) -> u32 {
        match self.setting {
            Threshold::Auto => self.controller.threshold(),
            Threshold::Fixed(tokens) => tokens,
            Threshold::Never => u32::MAX,
        }
    }

    /// The cluster that a prompt should go to, the uncached tokens that were compared with the threshold, and why.
    fn place(&mut self, now: Instant, total: u32, cached: Cached) -> (Site, u32, Reason) {
        let uncached = self.controller.route(now, total, cached).uncached;
        let threshold = self.threshold();
        if threshold == u32::MAX {
            return (Site::Local, uncached, Reason::Threshold);
        }
        if uncached > threshold {
            return (Site::Prfaas, uncached, Reason::Threshold);
        }
        // The comparison may have counted a prefix that only the PrfaaS cluster has.
        let missing = cached.prfaas.saturating_sub(cached.local);
        let alone = total - cached.local.min(total.saturating_sub(1));
        if missing > 0 && (alone > threshold || self.controller.sending_pays(missing)) {
            return (Site::Prfaas, uncached, Reason::Prefix);
        }
        (Site::Local, uncached, Reason::Threshold)
    }

    /// Notes the candidates' queues: what they have to do, and for the chosen one this prompt too.
    fn note(&mut self, now: Instant, total: u32, candidates: &[Candidate], chosen: usize) {
        let planner = self.controller.planner();
        let queued = candidates.iter().enumerate().map(|(index, candidate)| {
            let own = match index == chosen {
                true => u64::from(total.saturating_sub(candidate.cached)),
                false => 0,
            };
            let each = candidate
                .seconds_per_token
                .unwrap_or_else(|| planner.seconds_per_token(candidate.site, total));
            let tokens = candidate.load + own;
            let seconds = (tokens as f64 * each).clamp(0.0, LONGEST_QUEUE);
            let until = now + Duration::from_secs_f64(seconds);
            (candidate.worker, (tokens, until))
        });
        let queued: Vec<_> = queued.collect();
        self.queues.extend(queued);
    }
}

/// The longest queue in seconds that is counted with: a day.
const LONGEST_QUEUE: f64 = 86_400.0;

impl Policy {
    /// A policy over these workers.
    #[must_use]
    pub fn new(members: Arc<Members>, planner: Planner, setting: Threshold) -> Self {
        Self {
            members,
            state: Mutex::new(State {
                setting,
                controller: Controller::new(planner),
                journal: Journal::default(),
                queues: HashMap::new(),
            }),
        }
    }

    /// The workers that it knows.
    #[must_use]
    pub fn members(&self) -> &Arc<Members> {
        &self.members
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Chooses the worker that prefills a prompt of `total` tokens: its index among the candidates, `None` without any.
    pub fn choose(&self, total: u32, candidates: &[Candidate]) -> Option<usize> {
        let best = |site| {
            let of_site = candidates.iter().filter(|it| it.site == site);
            of_site.map(|it| it.cached).max().unwrap_or(0)
        };
        let cached = Cached {
            local: best(Site::Local),
            prfaas: best(Site::Prfaas),
        };
        let now = Instant::now();
        let mut state = self.state();
        let (wanted, uncached, mut reason) = state.place(now, total, cached);
        let turn = state.journal.next() as usize;
        let first = |site| soonest(total, candidates, site, turn);
        let chosen = first(wanted).or_else(|| first(other(wanted)))?;
        let candidate = candidates[chosen];
        let fallback = candidate.site != wanted;
        if fallback {
            reason = Reason::OnlyCluster;
        }
        let threshold = state.threshold();
        let decided = Decided {
            uncached,
            threshold: (threshold < u32::MAX).then_some(threshold),
            fallback,
            reason,
            ..Decided::new(total, cached, candidate.site, candidate.worker)
        };
        tracing::debug!(?decided, "prefill");
        state.journal.take(decided);
        state.note(now, total, candidates, chosen);
        Some(chosen)
    }

    /// Sets what the threshold follows, from the next prompt on.
    pub fn set_threshold(&self, setting: Threshold) {
        let before = std::mem::replace(&mut self.state().setting, setting);
        if before != setting {
            tracing::info!("threshold: {setting} (before: {before})");
        }
    }

    /// Takes the counters, about once a second, and the tokens of answers that were finished since. Returns the conversion that a local
    /// worker should make: (from, to); [`Policy::converted`] tells how it went.
    pub fn tick(&self, now: Instant, told: &Told, answered: &[u32]) -> Option<(Role, Role)> {
        let nodes = self.members.nodes();
        let queued = self.queued(now);
        let sum = |site| -> f64 {
            let of_site = queued.iter().filter(|it| it.0 == site);
            of_site.map(|it| it.1).sum()
        };
        let telemetry = Telemetry {
            sent_bytes: told.sent_bytes,
            retransmitted_bytes: told.retransmitted_bytes,
            queued_bytes: told.queued_bytes,
            prfaas_queue_seconds: told
                .prfaas_queue_seconds
                .unwrap_or_else(|| sum(Site::Prfaas)),
            local_queue_seconds: told.local_queue_seconds.unwrap_or_else(|| sum(Site::Local)),
        };
        let mut state = self.state();
        state.controller.tick(now, nodes, &telemetry, answered)
    }

    /// Ends a conversion.
    pub fn converted(&self, now: Instant, done: bool) {
        let nodes: Nodes = self.members.nodes();
        self.state().controller.converted(now, nodes, done);
    }

    /// Estimated node-seconds of queued prefill of each worker that is there. Those that have gone are forgotten.
    fn queued(&self, now: Instant) -> Vec<(Site, f64)> {
        let members = self.members.all();
        let mut state = self.state();
        state
            .queues
            .retain(|id, _| members.iter().any(|(key, _)| key.id == *id));
        let prefills = members
            .iter()
            .filter(|(_, member)| member.role == crate::wire::Role::Prefill);
        let queued = prefills.filter_map(|(key, member)| {
            let (_, until) = state.queues.get(&key.id)?;
            let seconds = until.saturating_duration_since(now).as_secs_f64();
            Some((member.site, seconds))
        });
        queued.collect()
    }

    /// Decisions with a number above `number`, and the last number.
    #[must_use]
    pub fn after(&self, number: u64) -> (u64, Vec<Decided>) {
        self.state().journal.after(number)
    }

    /// The state at this moment.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let now = Instant::now();
        let state = self.state();
        let threshold = state.threshold();
        let queues = state.queues.iter().map(|(id, (tokens, until))| {
            let seconds = until.saturating_duration_since(now).as_secs_f64();
            let tokens = if seconds > 0.0 { *tokens } else { 0 };
            (*id, Queue { tokens, seconds })
        });
        Snapshot {
            setting: state.setting,
            threshold: (threshold < u32::MAX).then_some(threshold),
            link: state.controller.link(),
            sums: state.journal.sums(),
            queues: queues.collect(),
        }
    }
}

/// The worker of a cluster that will be done with the prompt first: what it has to compute before, and what of the prompt it has not
/// cached. Where that is equal, the one with more of it cached; then they take turns.
fn soonest(total: u32, candidates: &[Candidate], site: Site, turn: usize) -> Option<usize> {
    let count = candidates.len();
    let of_site = candidates
        .iter()
        .enumerate()
        .filter(|(_, it)| it.site == site);
    let key = |(index, it): &(usize, &Candidate)| {
        let uncached = u64::from(total.saturating_sub(it.cached));
        let place = (index + turn) % count;
        (it.load + uncached, Reverse(it.cached), place)
    };
    of_site.min_by_key(key).map(|(index, _)| index)
}

#[cfg(test)]
mod tests;
