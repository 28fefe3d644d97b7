//! The scheduler over the workers that are there now.
//!
//! [`Scheduler`] plans for a fixed number of nodes. Workers come and go, so it is made again when their numbers have changed for a while,
//! from the prompts and answers that were seen last; its clock starts at the first of them.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use kimi_linear_plan::lengths::Lengths;
use kimi_linear_plan::model::Split;
use kimi_linear_plan::route::{Cached, Decision, LinkState, route};
use kimi_linear_plan::scheduler::{LinkStatus, Role, Scheduler, Telemetry};

use super::members::Nodes;
use super::planner::Planner;

/// How long other numbers of workers are seen before there is a new plan: a worker that restarts is back by then.
const SETTLE: Duration = Duration::from_secs(5);

/// Prompts and answers that were seen last.
#[derive(Debug)]
struct Seen {
    window: usize,
    /// When prompts came, and their uncached tokens.
    prompts: VecDeque<(Instant, u32)>,
    /// Tokens of answers.
    answers: VecDeque<u32>,
}

fn push<T>(queue: &mut VecDeque<T>, window: usize, item: T) {
    if queue.len() >= window.max(1) {
        queue.pop_front();
    }
    queue.push_back(item);
}

impl Seen {
    fn lengths(&self, least: usize) -> Option<Lengths> {
        let enough = self.prompts.len() >= least.max(1);
        let lengths = self.prompts.iter().map(|(_, tokens)| *tokens);
        enough.then(|| Lengths::observed(lengths.collect()).ok())?
    }

    fn output_tokens(&self) -> Option<f64> {
        let sum: u64 = self.answers.iter().map(|tokens| u64::from(*tokens)).sum();
        let count = self.answers.len();
        (count > 0).then(|| sum as f64 / count as f64)
    }
}

/// A scheduler, and what it was made for.
#[derive(Debug)]
struct Made {
    scheduler: Scheduler,
    nodes: Nodes,
    /// Its time 0.
    epoch: Instant,
    /// Counters at its time 0.
    before: Telemetry,
}

impl Made {
    fn time(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.epoch)
    }

    /// The counters since its time 0.
    fn since(&self, told: &Telemetry) -> Telemetry {
        Telemetry {
            sent_bytes: told.sent_bytes.saturating_sub(self.before.sent_bytes),
            retransmitted_bytes: told
                .retransmitted_bytes
                .saturating_sub(self.before.retransmitted_bytes),
            ..*told
        }
    }
}

/// Follows the workers with a scheduler.
#[derive(Debug)]
pub struct Controller {
    planner: Planner,
    seen: Seen,
    made: Option<Made>,
    /// Since when there have been other workers than the scheduler was made for, and which.
    other: Option<(Instant, Nodes)>,
    /// The role that a node is being converted to, and the one it had.
    converting: Option<(Role, Role)>,
    /// The last threshold, for the time without a scheduler.
    threshold: u32,
}

impl Controller {
    /// Without any worker yet.
    #[must_use]
    pub fn new(planner: Planner) -> Self {
        Self {
            seen: Seen {
                window: planner.options.window,
                prompts: VecDeque::new(),
                answers: VecDeque::new(),
            },
            planner,
            made: None,
            other: None,
            converting: None,
            threshold: u32::MAX,
        }
    }

    /// Its planner.
    #[must_use]
    pub fn planner(&self) -> &Planner {
        &self.planner
    }

    /// The scheduler's threshold; `u32::MAX` offloads nothing.
    #[must_use]
    pub fn threshold(&self) -> u32 {
        self.made
            .as_ref()
            .map_or(self.threshold, |made| made.scheduler.threshold())
    }

    /// The estimate of the link, once there are workers.
    #[must_use]
    pub fn link(&self) -> Option<LinkStatus> {
        self.made.as_ref().map(|made| made.scheduler.link())
    }

    /// The split that the scheduler counts with.
    #[must_use]
    pub fn split(&self) -> Option<Split> {
        self.made.as_ref().map(|made| made.scheduler.split())
    }

    /// The scheduler's decision for a prompt, which it remembers.
    pub fn route(&mut self, now: Instant, total: u32, cached: Cached) -> Decision {
        let decision = match &mut self.made {
            Some(made) => {
                let time = made.time(now);
                made.scheduler.route(time, total, cached)
            }
            None => route(total, cached, self.threshold, LinkState::Scarce, |_, _| {
                false
            }),
        };
        push(
            &mut self.seen.prompts,
            self.seen.window,
            (now, decision.uncached),
        );
        decision
    }

    /// Whether sending the cache of these tokens to the local cluster is faster than computing it there, and the link has room.
    #[must_use]
    pub fn sending_pays(&self, tokens: u32) -> bool {
        self.link().is_some_and(|link| {
            link.state == LinkState::Ample
                && self.planner.sending_pays(tokens, link.bits_per_second)
        })
    }

    /// Takes the counters, about once a second, and which workers there are. Returns the conversion that a local worker should make:
    /// (from, to). [`Controller::converted`] tells how it went.
    pub fn tick(
        &mut self,
        now: Instant,
        nodes: Nodes,
        told: &Telemetry,
        answered: &[u32],
    ) -> Option<(Role, Role)> {
        for tokens in answered {
            push(&mut self.seen.answers, self.seen.window, *tokens);
            if let Some(made) = &mut self.made {
                made.scheduler.answered(*tokens);
            }
        }
        self.follow(now, nodes, told);
        let made = self.made.as_mut()?;
        let (time, told) = (made.time(now), made.since(told));
        let order = made.scheduler.observe(time, &told);
        if order.is_some() {
            self.converting = order;
        }
        order
    }

    /// Ends a conversion: whether the worker has its new role, and which workers there are.
    pub fn converted(&mut self, now: Instant, nodes: Nodes, done: bool) {
        let Some((from, to)) = self.converting.take() else {
            return;
        };
        if let Some(made) = &mut self.made {
            let time = made.time(now);
            let role = if done { to } else { from };
            made.scheduler.converted(time, role);
            if done {
                made.nodes = nodes;
            }
        }
    }

    /// Makes a new scheduler if the workers are others for a while.
    fn follow(&mut self, now: Instant, nodes: Nodes, told: &Telemetry) {
        // A node that is being converted is in neither role for a moment.
        if self.converting.is_some() {
            return;
        }
        if self.made.as_ref().is_some_and(|made| made.nodes == nodes) {
            self.other = None;
            return;
        }
        let since = match self.other {
            Some((since, other)) if other == nodes => since,
            _ => now,
        };
        self.other = Some((since, nodes));
        if self.made.is_some() && now.saturating_duration_since(since) < SETTLE {
            return;
        }
        self.other = None;
        self.threshold = self.threshold();
        self.made = self.make(now, nodes, told);
        if let Some(made) = &self.made {
            tracing::info!(
                prfaas = nodes.prfaas,
                prefill = nodes.prefill,
                decode = nodes.decode,
                threshold = made.scheduler.threshold(),
                "planned for the workers that are there"
            );
        }
    }

    fn make(&self, now: Instant, nodes: Nodes, told: &Telemetry) -> Option<Made> {
        let lengths = self.seen.lengths(self.planner.options.settle);
        let expected = self.planner.expected.output_tokens;
        let output = self.seen.output_tokens().unwrap_or(expected);
        let mut scheduler = self.planner.scheduler(nodes, lengths.as_ref(), output)?;
        let epoch = self.seen.prompts.front().map_or(now, |(time, _)| *time);
        for (time, uncached) in &self.seen.prompts {
            let time = time.saturating_duration_since(epoch);
            let _ = scheduler.route(time, *uncached, Cached::default());
        }
        for tokens in &self.seen.answers {
            scheduler.answered(*tokens);
        }
        Some(Made {
            scheduler,
            nodes,
            epoch,
            before: *told,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::planner;
    use super::*;

    fn nodes(prfaas: u32, prefill: u32, decode: u32) -> Nodes {
        Nodes {
            prfaas,
            prefill,
            decode,
            both: 0,
        }
    }

    #[test]
    fn there_is_a_plan_as_soon_as_there_are_workers_and_another_when_they_have_changed() {
        let mut controller = Controller::new(planner());
        let (start, told) = (Instant::now(), Telemetry::default());
        let after = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(controller.threshold(), u32::MAX);
        assert_eq!(controller.tick(start, nodes(0, 0, 0), &told, &[]), None);
        assert_eq!(controller.split(), None);
        controller.tick(after(1), nodes(4, 3, 5), &told, &[]);
        let planned = controller.threshold();
        assert!((17_000..=21_000).contains(&planned), "{planned}");
        // A worker that restarts changes nothing.
        controller.tick(after(2), nodes(4, 2, 5), &told, &[]);
        controller.tick(after(4), nodes(4, 3, 5), &told, &[]);
        controller.tick(after(20), nodes(4, 2, 5), &told, &[]);
        assert_eq!(controller.threshold(), planned);
        controller.tick(after(26), nodes(4, 2, 5), &told, &[]);
        assert!(controller.threshold() < planned);
        // Without a PrfaaS cluster nothing is offloaded.
        controller.tick(after(30), nodes(0, 3, 5), &told, &[]);
        controller.tick(after(36), nodes(0, 3, 5), &told, &[]);
        assert_eq!(controller.threshold(), u32::MAX);
    }

    #[test]
    fn a_new_plan_is_for_the_prompts_that_were_seen() {
        let mut controller = Controller::new(planner());
        let (start, told) = (Instant::now(), Telemetry::default());
        let after = |seconds| start + Duration::from_secs(seconds);
        controller.tick(start, nodes(4, 3, 5), &told, &[]);
        let planned = controller.threshold();
        for number in 0..300 {
            controller.route(after(number / 100), 400, Cached::default());
        }
        controller.tick(after(4), nodes(3, 3, 5), &told, &[20, 30]);
        controller.tick(after(10), nodes(3, 3, 5), &told, &[]);
        // Short prompts are divided among the clusters as well.
        assert!(controller.threshold() <= 400 || controller.threshold() == u32::MAX);
        assert_ne!(controller.threshold(), planned);
    }

    #[test]
    fn a_conversion_that_failed_is_taken_back() {
        let mut controller = Controller::new(planner());
        let (start, told) = (Instant::now(), Telemetry::default());
        controller.tick(start, nodes(4, 3, 5), &told, &[]);
        // Nothing was ordered: there is nothing to end.
        controller.converted(start, nodes(4, 3, 5), true);
        let split = controller.split().unwrap();
        assert_eq!((split.prefill, split.decode), (3, 5));
        let made = controller.made.as_mut().unwrap();
        let from = made.scheduler.split();
        controller.converting = Some((Role::Decode, Role::Prefill));
        controller.converted(start, nodes(4, 3, 5), false);
        let split = controller.split().unwrap();
        assert_eq!(split.decode, from.decode + 1);
        assert_eq!(split.prefill, from.prefill);
    }
}
