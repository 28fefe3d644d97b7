//! The scheduler of both timescales (arXiv 2604.15039, section 3.4.3), for production and for the replay.
//!
//! Its caller passes in time and counters ([`Scheduler::observe`]), requests routing decisions ([`Scheduler::route`]) and
//! carries out the conversions of nodes that it returns. It has no clock, thread or socket.
//!
//! - Short: it monitors egress use, queues, loss and retransmission, and searches `t` again over the recent uncached lengths
//!   so that the backlog and the requests within a horizon are finished soonest ([`search::soonest`]).
//! - Long: if another split would have a markedly higher throughput, one prefill node becomes a decode node or the reverse.
//!
//! The paper gives no trigger values; [`Options`] has ours, each with its reason.

mod link;
mod recent;

use std::time::Duration;

use serde::Serialize;

use crate::model::{Averages, Costs, Demand, Deployment, Split, stages};
use crate::route::{Cached, Decision, route};
use crate::search::{self, Backlog};
pub use link::LinkStatus;
use link::LinkWatch;
use recent::Recent;

/// When the scheduler acts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Options {
    /// Recent requests over which the threshold is searched. 2,048 determine the offloaded fraction within 1.1 points (one
    /// standard error) and are some minutes of traffic.
    pub window: usize,
    /// Requests before the planned threshold is changed: 256 determine the fraction within 3 points.
    pub settle: usize,
    /// Time between searches without a trigger: traffic changes over minutes.
    pub search_every: Duration,
    /// Minimum time between searches with a trigger: a decision needs a few seconds to affect the counters.
    pub search_soonest: Duration,
    /// Time within which a backlog should be processed. If it is shorter the threshold oscillates, if it is longer queues
    /// remain.
    pub horizon: Duration,
    /// A threshold that is worse than the best by at most this fraction is kept: this is the noise of the window.
    pub deadband: f64,
    /// Use of the link, as a fraction of its rate, above which a search starts at once: beyond 80 % queues grow steeply.
    pub use_trigger: f64,
    /// Seconds of queued work at the link or, per node, at a prefill stage, above which a search starts at once: about one
    /// long prefill.
    pub drain_trigger: Duration,
    /// Retransmitted fraction of sent bytes above which a search starts at once: TCP's rate has collapsed by then, before any
    /// queue shows it.
    pub loss_trigger: f64,
    /// Use of the link above which copies of prefixes stop (it is scarce).
    pub scarce_above: f64,
    /// Use below which they start again: lower, so that the state does not oscillate.
    pub ample_below: f64,
    /// Fraction by which the estimate of the rate grows per second without a backlog: after a drop by 80 % it has recovered
    /// in a minute and a half.
    pub probe: f64,
    /// Time between evaluations of the split: a conversion takes a node out of service for about a minute, so they are rarer
    /// by an order of magnitude.
    pub replan_every: Duration,
    /// Minimum gain in throughput for a conversion.
    pub convert_gain: f64,
    /// Number of consecutive evaluations that must predict it, in the same direction.
    pub convert_agree: u32,
    /// Minimum time between two conversions.
    pub convert_pause: Duration,
    /// Minimum load, as a fraction of the current throughput, for a conversion: an idle cluster needs none.
    pub convert_busy: f64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            window: 2048,
            settle: 256,
            search_every: Duration::from_secs(10),
            search_soonest: Duration::from_secs(3),
            horizon: Duration::from_secs(60),
            deadband: 0.02,
            use_trigger: 0.8,
            drain_trigger: Duration::from_secs(5),
            loss_trigger: 0.01,
            scarce_above: 0.7,
            ample_below: 0.5,
            probe: 0.02,
            replan_every: Duration::from_secs(300),
            convert_gain: 0.05,
            convert_agree: 2,
            convert_pause: Duration::from_secs(600),
            convert_busy: 0.5,
        }
    }
}

/// Counters of the clusters: totals since the start, and current lengths of queues.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Telemetry {
    /// Bytes that the link out of the PrfaaS cluster has delivered.
    pub sent_bytes: u64,
    /// Bytes that were sent again.
    pub retransmitted_bytes: u64,
    /// Bytes queued at the link.
    pub queued_bytes: u64,
    /// Node-seconds of prefill queued at the PrfaaS cluster.
    pub prfaas_queue_seconds: f64,
    /// Node-seconds of prefill queued at the local cluster.
    pub local_queue_seconds: f64,
}

/// The role of a local node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Prefill.
    Prefill,
    /// Decode.
    Decode,
}

/// The scheduler.
#[derive(Debug)]
pub struct Scheduler {
    options: Options,
    /// With the current estimate of the link's rate.
    deployment: Deployment,
    threshold: u32,
    split: Split,
    planned_output: f64,
    recent: Recent,
    link: LinkWatch,
    searched: Duration,
    replanned: Duration,
    converted: Option<Duration>,
    converting: Option<Role>,
    /// The direction of the last consecutive evaluations, and their number.
    agreed: Option<(Role, u32)>,
}

impl Scheduler {
    /// Starts with a plan's threshold and split; `output_tokens` is the mean length of answers until some are finished.
    #[must_use]
    pub fn new(
        deployment: Deployment,
        threshold: u32,
        split: Split,
        output_tokens: f64,
        options: Options,
    ) -> Self {
        Self {
            link: LinkWatch::new(deployment.link_bits_per_second),
            recent: Recent::new(options.window),
            options,
            deployment,
            threshold,
            split,
            planned_output: output_tokens,
            searched: Duration::ZERO,
            replanned: Duration::ZERO,
            converted: None,
            converting: None,
            agreed: None,
        }
    }

    /// The current threshold.
    #[must_use]
    pub fn threshold(&self) -> u32 {
        self.threshold
    }

    /// The current nodes by role; a node that is being converted counts for neither.
    #[must_use]
    pub fn split(&self) -> Split {
        self.split
    }

    /// The current estimate of the link.
    #[must_use]
    pub fn link(&self) -> LinkStatus {
        self.link.status()
    }

    /// Routes a prompt of `total` tokens, given the tokens of it that the clusters have cached.
    pub fn route(&mut self, now: Duration, total: u32, cached: Cached) -> Decision {
        let status = self.link.status();
        let pays = |site, tokens| {
            self.deployment
                .copy_pays(site, tokens, status.bits_per_second)
        };
        let decision = route(total, cached, self.threshold, status.state, pays);
        self.recent.arrived(now, decision.uncached);
        decision
    }

    /// Reports that an answer of this number of tokens is finished.
    pub fn answered(&mut self, tokens: u32) {
        self.recent.answered(tokens);
    }

    /// Processes counters, about once a second; changes the threshold if that helps, and returns the conversion that a node
    /// should make: (from, to). The caller confirms it with [`Self::converted`] when it is done.
    pub fn observe(&mut self, now: Duration, told: &Telemetry) -> Option<(Role, Role)> {
        self.link.observe(now, told, &self.options);
        self.deployment.link_bits_per_second = self.link.status().bits_per_second;
        let since = now.saturating_sub(self.searched);
        let due = since >= self.options.search_every
            || (since >= self.options.search_soonest && self.pressed(told));
        if due && self.recent.count() >= self.options.settle.min(self.options.window) {
            self.searched = now;
            self.search(now, told);
        }
        if now.saturating_sub(self.replanned) < self.options.replan_every {
            return None;
        }
        self.replanned = now;
        self.replan(now)
    }

    /// Reports that a node has been converted to `role`.
    pub fn converted(&mut self, now: Duration, role: Role) {
        match role {
            Role::Prefill => self.split.prefill += 1,
            Role::Decode => self.split.decode += 1,
        }
        self.converting = None;
        self.converted = Some(now);
    }

    /// Whether a search should start at once.
    fn pressed(&self, told: &Telemetry) -> bool {
        let status = self.link.status();
        let trigger = self.options.drain_trigger.as_secs_f64();
        let waits = |seconds: f64, nodes: u32| seconds / f64::from(nodes.max(1)) > trigger;
        status.used > self.options.use_trigger
            || status.loss > self.options.loss_trigger
            || status.drain_seconds > trigger
            || waits(told.prfaas_queue_seconds, self.deployment.prfaas_nodes)
            || waits(told.local_queue_seconds, self.split.prefill)
    }

    /// The short timescale.
    fn search(&mut self, now: Duration, told: &Telemetry) {
        let backlog = Backlog {
            prfaas_seconds: told.prfaas_queue_seconds,
            local_seconds: told.local_queue_seconds,
            link_bytes: told.queued_bytes as f64,
        };
        let pressed = self.pressed(told);
        if self.recent.take_new() == 0 && !pressed {
            return;
        }
        let Some(lengths) = self.recent.lengths() else {
            return;
        };
        let requests = (self.recent.rate(now) * self.options.horizon.as_secs_f64()).max(1.0);
        let found = search::soonest(
            &self.deployment,
            &lengths,
            self.split,
            backlog,
            requests,
            self.threshold,
        );
        if found.present_seconds > found.seconds * (1.0 + self.options.deadband) {
            self.threshold = found.threshold;
        }
    }

    /// The long timescale.
    fn replan(&mut self, now: Duration) -> Option<(Role, Role)> {
        let paused = self
            .converted
            .is_some_and(|then| now.saturating_sub(then) < self.options.convert_pause);
        if self.converting.is_some() || paused || self.recent.count() < self.options.settle {
            return None;
        }
        let lengths = self.recent.lengths()?;
        let demand = Demand {
            lengths: &lengths,
            output_tokens: self.recent.output_tokens().unwrap_or(self.planned_output),
            averages: Averages::OfWork,
        };
        let work = Costs::new(&self.deployment, &lengths, demand.averages).at(self.threshold);
        let present = stages(&self.deployment, demand.output_tokens, &work, self.split).throughput;
        let best = search::best(&self.deployment, demand);
        let gains = best.stages.throughput > present * (1.0 + self.options.convert_gain);
        let busy = self.recent.rate(now) > present * self.options.convert_busy;
        let to = if best.split.prefill > self.split.prefill {
            Role::Prefill
        } else {
            Role::Decode
        };
        // The last node of a role is not converted: its queued work could not be moved.
        let last = match to {
            Role::Prefill => self.split.decode <= 1,
            Role::Decode => self.split.prefill <= 1,
        };
        if !gains || !busy || last || best.split == self.split {
            self.agreed = None;
            return None;
        }
        let times = match self.agreed {
            Some((role, times)) if role == to => times + 1,
            _ => 1,
        };
        self.agreed = Some((to, times));
        if times < self.options.convert_agree {
            return None;
        }
        self.agreed = None;
        self.converting = Some(to);
        match to {
            Role::Prefill => {
                self.split.decode -= 1;
                Some((Role::Decode, to))
            }
            Role::Decode => {
                self.split.prefill -= 1;
                Some((Role::Prefill, to))
            }
        }
    }
}

#[cfg(test)]
mod tests;
