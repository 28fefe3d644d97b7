//! The scheduler of both timescales (arXiv 2604.15039, section 3.4.3), for production and for the replay alike.
//!
//! Its caller passes the time and counters in ([`Scheduler::observe`]), asks where each request goes
//! ([`Scheduler::route`]) and carries out the conversions of nodes that it answers with. It owns no clock, thread or socket.
//!
//! - Short: egress use, queues, loss and retransmission are watched, and `t` is searched again over the recent uncached lengths so that
//!   what waits and what comes within a horizon is done soonest ([`search::soonest`]).
//! - Long: where another split would serve markedly more, one prefill node becomes a decode node or the other way round.
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
    /// Recent requests that the threshold is searched over. 2,048 tell the offloaded share within 1.1 points (one standard error)
    /// and are some minutes of traffic.
    pub window: usize,
    /// Requests to see before the planned threshold is touched: 256 tell the share within 3 points.
    pub settle: usize,
    /// Time between searches while nothing presses: traffic changes over minutes.
    pub search_every: Duration,
    /// The least time between searches while something does: a decision needs a few seconds to show in the counters.
    pub search_soonest: Duration,
    /// Time within which a backlog should be gone; shorter and the threshold swings, longer and queues stay.
    pub horizon: Duration,
    /// A threshold that is worse than the best by no more than this part is kept: within it lies the noise of the window.
    pub deadband: f64,
    /// Use of the link, as a part of what it can carry, above which a search is due at once: beyond 80 % queues grow steeply.
    pub use_trigger: f64,
    /// Seconds of work that wait at the link or, for each node, at a prefill stage, above which a search is due at once: about one
    /// long prefill.
    pub drain_trigger: Duration,
    /// Retransmitted part of what is sent above which a search is due at once: TCP's rate has collapsed by then, and no queue shows it yet.
    pub loss_trigger: f64,
    /// Use of the link above which copies of prefixes stop (it is scarce) ...
    pub scarce_above: f64,
    /// ... and below which they start again: apart, so that the state does not flap.
    pub ample_below: f64,
    /// Part by which the link is thought to have recovered in a second without a backlog: a link that fell by 80 % is believed again
    /// after a minute and a half.
    pub probe: f64,
    /// Time between looks at the split: a conversion costs a node for a minute or so, so looks are rarer by an order of magnitude.
    pub replan_every: Duration,
    /// The gain in throughput that a conversion must promise.
    pub convert_gain: f64,
    /// Looks in a row that must promise it, in the same direction.
    pub convert_agree: u32,
    /// Time that must pass between two conversions.
    pub convert_pause: Duration,
    /// The part of the present throughput that must be asked for before a node is turned: an idle cluster needs none.
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

/// Counters of the clusters, since the start where they count and at this moment where they do not.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Telemetry {
    /// Bytes that the link out of the PrfaaS cluster has delivered.
    pub sent_bytes: u64,
    /// Bytes that were sent again.
    pub retransmitted_bytes: u64,
    /// Bytes that wait for the link.
    pub queued_bytes: u64,
    /// Node-seconds of prefill that wait at the PrfaaS cluster.
    pub prfaas_queue_seconds: f64,
    /// Node-seconds of prefill that wait at the local cluster.
    pub local_queue_seconds: f64,
}

/// What a local node does.
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
    /// With the link's rate as it is known now.
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
    /// The direction that the last looks agreed on, and how many they were.
    agreed: Option<(Role, u32)>,
}

impl Scheduler {
    /// Begins with a plan's threshold and split; `output_tokens` are the answers' mean until some are finished.
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

    /// The threshold now.
    #[must_use]
    pub fn threshold(&self) -> u32 {
        self.threshold
    }

    /// The nodes by role now; one that is being converted counts for neither.
    #[must_use]
    pub fn split(&self) -> Split {
        self.split
    }

    /// The link as it is known now.
    #[must_use]
    pub fn link(&self) -> LinkStatus {
        self.link.status()
    }

    /// Where a prompt of `total` tokens is prefilled, given what the clusters have cached of it.
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

    /// Tells it that an answer of so many tokens is finished.
    pub fn answered(&mut self, tokens: u32) {
        self.recent.answered(tokens);
    }

    /// Takes counters in, about once a second; moves the threshold where that helps, and says which node should change its role:
    /// (from, to). The caller confirms with [`Self::converted`] once it has.
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

    /// Tells it that the node that was to take up `role` has done so.
    pub fn converted(&mut self, now: Duration, role: Role) {
        match role {
            Role::Prefill => self.split.prefill += 1,
            Role::Decode => self.split.decode += 1,
        }
        self.converting = None;
        self.converted = Some(now);
    }

    /// Whether a search is due at once.
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
        // The last node of a role stays: what waits for it could not be moved.
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
