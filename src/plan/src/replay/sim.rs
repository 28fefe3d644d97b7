//! The events of a replay.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use super::cache::PrefixCache;
use super::link::Link;
use super::outcome::{Outcome, Sample};
use super::pool::Pool;
use super::tally::Tally;
use super::{Arrivals, Policy, Served, Setup};
use crate::model::Split;
use crate::route::{Cached, Decision, LinkState, Site, route};
use crate::scheduler::{Role, Scheduler, Telemetry};
use crate::trace::Trace;

/// Time between two reads of the counters.
const TICK: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// The trace's next request.
    Arrive,
    /// A prefill is done.
    Prefilled(Site, u32),
    /// The next layers of a prompt's cache are computed.
    Piece(u32),
    /// A flow of the link out of the PrfaaS cluster, or into it, ends, unless the link has changed since.
    Out(u32),
    In(u32),
    /// All of a sent cache has arrived.
    Landed(u32),
    /// A copied prefix has arrived.
    Copied(u32),
    /// An answer is finished.
    Decoded(u32),
    /// Time to read the counters.
    Tick,
    /// The link's n-th change of rate.
    Change(usize),
    /// A node starts in its new role.
    Converted(Role),
}

/// How threshold and split are decided.
enum Decider {
    Fixed(LinkState),
    Scheduler(Box<Scheduler>),
}

/// A flow on a link.
#[derive(Debug, Clone, Copy)]
pub(super) enum Flow {
    Piece(u32),
    Copy(u32),
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Job {
    decision: Decision,
    arrived: Duration,
    /// When the prefill began, and its duration.
    began: Duration,
    work: Duration,
    first_token: Duration,
    /// Pieces of the cache that are computed, and that have arrived.
    filled: u32,
    came: u32,
}

pub(super) struct Simulation<'a> {
    pub(super) trace: &'a Trace,
    pub(super) setup: &'a Setup,
    decider: Decider,
    pub(super) now: Duration,
    events: BinaryHeap<Reverse<(Duration, u64, Event)>>,
    number: u64,
    next: usize,
    pub(super) done: usize,
    pub(super) jobs: Vec<Option<Job>>,
    pub(super) prfaas: Pool,
    pub(super) local: Pool,
    pub(super) decode: Pool,
    pub(super) out: Link<Flow>,
    into: Link<Flow>,
    caches: [PrefixCache; 2],
    converting: Option<(Role, Role)>,
    ended: Vec<Flow>,
    pub(super) tally: Tally,
}

impl<'a> Simulation<'a> {
    pub(super) fn new(trace: &'a Trace, setup: &'a Setup) -> Self {
        let deployment = &setup.deployment;
        let rate = setup.link.goodput(deployment.link_bits_per_second);
        let decider = match setup.policy {
            Policy::Fixed { link } => Decider::Fixed(link),
            Policy::Scheduled(options) => Decider::Scheduler(Box::new(Scheduler::new(
                deployment.clone(),
                setup.threshold,
                setup.split,
                trace.output_tokens(),
                options,
            ))),
        };
        let slots = deployment.local.decode().slots;
        Self {
            trace,
            setup,
            decider,
            now: Duration::ZERO,
            events: BinaryHeap::new(),
            number: 0,
            next: 0,
            done: 0,
            jobs: vec![None; trace.requests().len()],
            prfaas: Pool::new(deployment.prfaas_nodes),
            local: Pool::new(setup.split.prefill),
            decode: Pool::new(setup.split.decode * slots),
            out: Link::new(rate),
            into: Link::new(rate),
            caches: [(); 2].map(|()| PrefixCache::new(setup.cache_blocks)),
            converting: None,
            ended: Vec::new(),
            tally: Tally::new(trace.requests().len()),
        }
    }

    pub(super) fn run(mut self, served: &mut dyn FnMut(&Served)) -> Outcome {
        for number in 0..self.setup.changes.len() {
            self.at(self.setup.changes[number].at, Event::Change(number));
        }
        self.at(TICK, Event::Tick);
        match self.setup.arrivals {
            Arrivals::Traced => self.at(self.trace.requests()[0].at, Event::Arrive),
            Arrivals::Saturated { in_flight } => {
                for _ in 0..in_flight.min(self.jobs.len()) {
                    self.arrive();
                }
            }
        }
        while self.done < self.jobs.len() {
            let Some(Reverse((at, _, event))) = self.events.pop() else {
                break;
            };
            self.now = at;
            self.happen(event, served);
        }
        self.outcome()
    }

    fn at(&mut self, at: Duration, event: Event) {
        self.events.push(Reverse((at, self.number, event)));
        self.number += 1;
    }

    fn happen(&mut self, event: Event, served: &mut dyn FnMut(&Served)) {
        match event {
            Event::Arrive => {
                self.arrive();
                if let Some(request) = self.trace.requests().get(self.next) {
                    self.at(request.at, Event::Arrive);
                }
            }
            Event::Copied(job) => self.prefill(job),
            Event::Prefilled(site, job) => self.prefilled(site, job),
            Event::Piece(job) => self.piece(job),
            Event::Out(version) if version == self.out.version => {
                self.out.ended(self.now, &mut self.ended);
                self.crossed();
                self.watch_out();
            }
            Event::In(version) if version == self.into.version => {
                self.into.ended(self.now, &mut self.ended);
                self.crossed();
                self.watch_in();
            }
            // From before a change of the link: a newer event replaced it.
            Event::Out(_) | Event::In(_) => {}
            Event::Landed(job) => self.decodable(job),
            Event::Decoded(job) => self.decoded(job, served),
            Event::Tick => self.tick(),
            Event::Change(number) => {
                let bits = self.setup.deployment.link_bits_per_second;
                let rate = self
                    .setup
                    .link
                    .goodput(bits * self.setup.changes[number].factor);
                self.out.set_rate(self.now, rate);
                self.into.set_rate(self.now, rate);
                self.watch_out();
                self.watch_in();
            }
            Event::Converted(role) => self.converted(role),
        }
    }

    fn decide(&mut self, total: u32, cached: Cached) -> Decision {
        match &mut self.decider {
            Decider::Scheduler(scheduler) => scheduler.route(self.now, total, cached),
            Decider::Fixed(link) => {
                let bits = 8.0 * self.out.rate();
                let pays = |site, tokens| self.setup.deployment.copy_pays(site, tokens, bits);
                route(total, cached, self.setup.threshold, *link, pays)
            }
        }
    }

    /// Admits the trace's next request.
    fn arrive(&mut self) {
        let Some(request) = self.trace.requests().get(self.next) else {
            return;
        };
        let index = self.next as u32;
        self.next += 1;
        let blocks = self.trace.blocks(request);
        let known = |cache: &PrefixCache| cache.known(blocks) * self.trace.block_tokens();
        let cached = Cached {
            local: known(&self.caches[0]),
            prfaas: known(&self.caches[1]),
        };
        let decision = self.decide(request.tokens, cached);
        self.tally.prompt_tokens += u64::from(request.tokens);
        self.tally.prefilled_tokens += u64::from(decision.prefill);
        self.tally.offloaded += usize::from(decision.site == Site::Prfaas);
        self.jobs[index as usize] = Some(Job {
            decision,
            arrived: self.now,
            began: Duration::ZERO,
            work: Duration::ZERO,
            first_token: Duration::ZERO,
            filled: 0,
            came: 0,
        });
        if decision.copy == 0 {
            self.prefill(index);
            return;
        }
        let bytes = self.setup.deployment.prfaas.bytes(f64::from(decision.copy)) as u64;
        match decision.site {
            Site::Local => {
                self.tally.copied_home_bytes += bytes;
                self.out.add(self.now, bytes, Flow::Copy(index));
                self.watch_out();
            }
            Site::Prfaas => {
                self.tally.copied_out_bytes += bytes;
                self.into.add(self.now, bytes, Flow::Copy(index));
                self.watch_in();
            }
        }
    }

    /// A job that has arrived.
    fn job(&mut self, job: u32) -> Option<&mut Job> {
        self.jobs[job as usize].as_mut()
    }

    /// Queues a prefill.
    fn prefill(&mut self, index: u32) {
        let deployment = &self.setup.deployment;
        let Some(job) = self.jobs[index as usize].as_mut() else {
            return;
        };
        let tokens = f64::from(job.decision.prefill);
        let site = job.decision.site;
        let (pool, profile) = match site {
            Site::Local => (&mut self.local, &deployment.local),
            Site::Prfaas => (&mut self.prfaas, &deployment.prfaas),
        };
        job.work = Duration::from_secs_f64(profile.seconds(tokens));
        pool.push(index, job.work);
        self.start_prefills(site);
    }

    fn start_prefills(&mut self, site: Site) {
        loop {
            let pool = match site {
                Site::Local => &mut self.local,
                Site::Prfaas => &mut self.prfaas,
            };
            let Some((index, work)) = pool.start() else {
                return;
            };
            let now = self.now;
            if let Some(job) = self.job(index) {
                job.began = now;
            }
            self.at(now + work, Event::Prefilled(site, index));
            if site == Site::Prfaas {
                self.at(now + work / self.setup.link.pieces, Event::Piece(index));
            }
        }
    }

    fn prefilled(&mut self, site: Site, index: u32) {
        let request = &self.trace.requests()[index as usize];
        let blocks = self.trace.blocks(request);
        match site {
            Site::Local => {
                self.local.busy -= 1;
                self.caches[0].insert(blocks);
                self.decodable(index);
                self.convert();
            }
            Site::Prfaas => {
                self.prfaas.busy -= 1;
                self.caches[1].insert(blocks);
            }
        }
        self.start_prefills(site);
    }

    /// Sends the layers that have just been computed, and waits for the next ones.
    fn piece(&mut self, index: u32) {
        let (now, pieces) = (self.now, self.setup.link.pieces);
        let deployment = &self.setup.deployment;
        let Some(job) = self.jobs[index as usize].as_mut() else {
            return;
        };
        let total = deployment.prfaas.bytes(f64::from(job.decision.ship)) as u64;
        let up_to = |piece: u32| total * u64::from(piece) / u64::from(pieces);
        let bytes = up_to(job.filled + 1) - up_to(job.filled);
        job.filled += 1;
        let (filled, next) = (job.filled, job.began + job.work * (job.filled + 1) / pieces);
        self.tally.shipped_bytes += bytes;
        self.out.add(now, bytes, Flow::Piece(index));
        self.watch_out();
        if filled < pieces {
            self.at(next, Event::Piece(index));
        }
    }

    fn watch_out(&mut self) {
        self.tally.link_peak = self.tally.link_peak.max(self.out.waiting());
        if let Some(at) = self.out.next() {
            self.at(at, Event::Out(self.out.version));
        }
    }

    fn watch_in(&mut self) {
        if let Some(at) = self.into.next() {
            self.at(at, Event::In(self.into.version));
        }
    }

    /// Handles flows of a link that have ended.
    fn crossed(&mut self) {
        let (pieces, then) = (self.setup.link.pieces, self.now + self.setup.link.latency);
        let mut ended = std::mem::take(&mut self.ended);
        for flow in ended.drain(..) {
            match flow {
                Flow::Copy(index) => self.at(then, Event::Copied(index)),
                Flow::Piece(index) => {
                    let Some(job) = self.job(index) else {
                        continue;
                    };
                    job.came += 1;
                    if job.came == pieces {
                        self.at(then, Event::Landed(index));
                    }
                }
            }
        }
        self.ended = ended;
    }

    /// All of a prompt's cache is at the local cluster.
    fn decodable(&mut self, index: u32) {
        let request = &self.trace.requests()[index as usize];
        let local = &self.setup.deployment.local;
        self.caches[0].insert(self.trace.blocks(request));
        let step = local.decode().step_seconds;
        let work = Duration::from_secs_f64(step * f64::from(request.output));
        self.decode.push(index, work);
        self.start_decodes();
    }

    fn start_decodes(&mut self) {
        let step = Duration::from_secs_f64(self.setup.deployment.local.decode().step_seconds);
        while let Some((index, work)) = self.decode.start() {
            let now = self.now;
            if let Some(job) = self.job(index) {
                job.first_token = now + step;
            }
            self.at(now + work, Event::Decoded(index));
        }
    }

    fn decoded(&mut self, index: u32, served: &mut dyn FnMut(&Served)) {
        self.decode.busy -= 1;
        self.done += 1;
        let count = self.jobs.len();
        if self.done == count.div_ceil(10) {
            self.tally.tenth = self.now;
        }
        if self.done == (9 * count).div_ceil(10) {
            self.tally.nine_tenths = self.now;
        }
        if let Some(job) = self.jobs[index as usize].take() {
            let waited = job.first_token - job.arrived;
            self.tally.ttft.push(waited.as_secs_f64());
            served(&Served {
                index: index as usize,
                decision: job.decision,
                arrived: job.arrived,
                first_token: job.first_token,
                done: self.now,
            });
        }
        if let Decider::Scheduler(scheduler) = &mut self.decider {
            scheduler.answered(self.trace.requests()[index as usize].output);
        }
        self.convert();
        self.start_decodes();
        if matches!(self.setup.arrivals, Arrivals::Saturated { .. }) {
            self.arrive();
        }
    }

    fn tick(&mut self) {
        self.at(self.now + TICK, Event::Tick);
        self.out.look(self.now);
        let waiting = self.out.waiting();
        let passed = self.out.passed;
        let again = self.setup.link.loss / (1.0 - self.setup.link.loss);
        if let Decider::Scheduler(scheduler) = &mut self.decider {
            let told = Telemetry {
                sent_bytes: passed as u64,
                retransmitted_bytes: (passed * again) as u64,
                queued_bytes: waiting as u64,
                prfaas_queue_seconds: self.prfaas.queued_seconds(),
                local_queue_seconds: self.local.queued_seconds(),
            };
            if let Some((from, to)) = scheduler.observe(self.now, &told) {
                self.converting = Some((from, to));
                let (pool, servers) = self.pool_of(from);
                let fewer = pool.servers - servers;
                let now = self.now;
                self.pool_of(from).0.resize(now, fewer);
                self.convert();
            }
        }
        let (threshold, split, link) = self.standing();
        let sample = || Sample {
            at: self.now.as_secs_f64(),
            threshold,
            split,
            link_bits_per_second: link,
            link_bytes: waiting,
            prfaas_waiting: self.prfaas.waiting(),
            local_waiting: self.local.waiting(),
            decode_waiting: self.decode.waiting(),
        };
        self.tally.series.push(sample);
    }

    pub(super) fn standing(&self) -> (u32, Split, f64) {
        match &self.decider {
            Decider::Scheduler(scheduler) => (
                scheduler.threshold(),
                scheduler.split(),
                scheduler.link().bits_per_second,
            ),
            Decider::Fixed(_) => (
                self.setup.threshold,
                self.setup.split,
                8.0 * self.out.rate(),
            ),
        }
    }

    /// The pool of a role, and the number of its servers per node.
    fn pool_of(&mut self, role: Role) -> (&mut Pool, u32) {
        match role {
            Role::Prefill => (&mut self.local, 1),
            Role::Decode => (&mut self.decode, self.setup.deployment.local.decode().slots),
        }
    }

    /// Lets a node that is to change its role start when its work is done.
    fn convert(&mut self) {
        let Some((from, to)) = self.converting else {
            return;
        };
        let (pool, _) = self.pool_of(from);
        if pool.busy <= pool.servers {
            self.converting = None;
            let at = self.now + self.setup.convert;
            self.at(at, Event::Converted(to));
        }
    }

    fn converted(&mut self, role: Role) {
        let now = self.now;
        let (pool, servers) = self.pool_of(role);
        let more = pool.servers + servers;
        pool.resize(now, more);
        self.tally.conversions.push((now.as_secs_f64(), role));
        if let Decider::Scheduler(scheduler) = &mut self.decider {
            scheduler.converted(now, role);
        }
        match role {
            Role::Prefill => self.start_prefills(Site::Local),
            Role::Decode => self.start_decodes(),
        }
    }
}
