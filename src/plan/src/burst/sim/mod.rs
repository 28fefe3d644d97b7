//! Instances that serve a trace in virtual time, event by event.
//!
//! Modelled are: every step or micro-batch of every group, each of which decodes all idle sequences and prefills chunks of
//! prompts; the stages that a micro-batch passes one after the other, with a hop between; memory in blocks on every instance;
//! caches and parameters that are sent over links. A prompt's memory is allocated when its prefill begins, first come, first
//! served; a sequence allocates further blocks as it grows. Not modelled are: prefix caches, contention between groups on the
//! network, the time of a scheduler.

mod failure;
mod memory;
mod relief;
mod reshape;
mod step;
mod tally;

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, VecDeque};

use super::cost::Costs;
use super::exchange::Exchange;
use super::instance::{Cache, Form, Way};
use super::outcome::Outcome;
use super::trigger::{Demand, Trigger};
use super::{Held, Policy, Setup};
use crate::trace::Trace;
use memory::Memory;
use tally::Tally;

/// The fraction of an instance's memory that an admission leaves free, as in vLLM, so that running sequences can grow.
pub(super) const WATERMARK: f64 = 0.01;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// The trace's next request.
    Arrive,
    /// A group may start a step.
    Launch(usize),
    /// A micro-batch has finished.
    Through(usize),
    /// Time to poll the demand.
    Poll,
    /// The groups of a plan merge.
    Commit(usize),
    /// Bytes of an exchange have been sent: group, layout of their origin, bytes.
    Chunk(usize, usize, u64),
    /// A group's parameters are restored; void if the restore was cancelled since (its number).
    Restored(usize, u32),
    /// A cache has reached host memory, has come back, or has reached another instance; void if the job's epoch has changed.
    SwappedOut(u32, u32),
    SwappedIn(u32, u32),
    Migrated(u32, u32),
    /// An instance fails, or has its parameters again.
    Fail(usize),
    Reloaded(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Not arrived, or finished.
    Away,
    /// In a group's queue.
    Waiting,
    /// In its group's prefill or decode queue, or in a step.
    Running,
    /// Its cache is being exchanged.
    Moving,
    /// Its cache is being moved to host memory, is there, or is being moved back.
    Leaving,
    Swapped,
    Returning,
    /// Its cache is being moved to another instance.
    Migrating,
}

#[derive(Debug, Clone)]
struct Job {
    arrived: f64,
    prompt: u32,
    output: u32,
    /// Tokens of the answer that are done.
    done: u32,
    /// Tokens to prefill before the next token of the answer: the prompt, and the answer so far if its cache was given up.
    target: u32,
    /// Tokens that are cached or being computed.
    filled: u32,
    blocks: u32,
    layout: usize,
    group: usize,
    /// Number of running steps with this job.
    flying: u32,
    state: State,
    /// Counts how often the cache was given up: events of an earlier epoch are void.
    epoch: u32,
    /// Destination of a migration.
    to: usize,
    first_token: f64,
}

#[derive(Debug, Clone, Copy)]
struct Part {
    job: u32,
    decode: bool,
    /// Whether this completes the prompt's prefill.
    last: bool,
}

#[derive(Debug, Default)]
struct Flight {
    group: usize,
    parts: Vec<Part>,
    /// Seconds for its decodes.
    decode_cost: f64,
}

#[derive(Debug)]
struct Move {
    origin: usize,
    exchange: Exchange,
    /// Bytes per second.
    rate: f64,
    /// A cache has arrived, but there is no memory for it.
    stalled: bool,
}

#[derive(Debug, Default)]
struct Group {
    alive: bool,
    /// No step starts: the group is about to merge or to split.
    closing: bool,
    /// The plan by which it merges.
    plan: Option<usize>,
    restoring: bool,
    /// Counts restores.
    restores: u32,
    members: Vec<usize>,
    /// Layouts for caches: one for a pipeline, one for each member if only experts were dropped.
    homes: Vec<usize>,
    waiting: VecDeque<u32>,
    /// Bytes that these need.
    queued: u64,
    swapped: VecDeque<u32>,
    /// A cache is being moved to host memory, or to another instance.
    leaving: bool,
    prefill: VecDeque<u32>,
    /// Tokens to prefill for these.
    pending: u64,
    /// Idle sequences that decode.
    decode: VecDeque<u32>,
    /// All sequences that decode, in steps or idle.
    decoding: usize,
    /// All jobs with memory here, or being moved here, by arrival.
    running: BTreeSet<u32>,
    flights: VecDeque<usize>,
    /// The time at which each stage is free.
    free_at: Vec<f64>,
    /// A launch is scheduled.
    timer: bool,
    stage_seconds: f64,
    /// Bytes of activations of the last step.
    activation_bytes: f64,
    moves: Vec<Move>,
    moves_began: f64,
    /// Bytes on every member for caches that are being moved here.
    reserve: u64,
    /// Activations wait until this time for an uncoordinated exchange.
    blocked_until: f64,
}

pub(super) struct Simulation<'a> {
    trace: &'a Trace,
    setup: &'a Setup,
    costs: Costs,
    way: Way,
    cache: Cache,
    now: f64,
    /// Times as the bits of non-negative numbers, which have the same order.
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    number: u64,
    next: usize,
    finished: usize,
    jobs: Vec<Job>,
    groups: Vec<Group>,
    flights: Vec<Flight>,
    free_flights: Vec<usize>,
    memory: Memory,
    trigger: Trigger,
    plans: Vec<Vec<usize>>,
    /// The time at which the link to host memory is free, by instance, and the bytes there.
    host_free: Vec<f64>,
    host_held: Vec<u64>,
    failed: Vec<bool>,
    /// Requests that no group can accept.
    stranded: VecDeque<u32>,
    tally: Tally,
}

impl<'a> Simulation<'a> {
    pub(super) fn new(trace: &'a Trace, setup: &'a Setup, costs: Costs, way: Way) -> Self {
        let instances = setup.instances as usize;
        let job = |request: &crate::trace::Request| Job {
            arrived: request.at.as_secs_f64(),
            prompt: request.tokens,
            output: request.output,
            done: 0,
            target: request.tokens,
            filled: 0,
            blocks: 0,
            layout: 0,
            group: 0,
            flying: 0,
            state: State::Away,
            epoch: 0,
            to: 0,
            first_token: f64::NAN,
        };
        let instance = &setup.instance;
        let mut simulation = Self {
            trace,
            setup,
            costs,
            way,
            cache: instance.cache(),
            now: 0.0,
            events: BinaryHeap::new(),
            number: 0,
            next: 0,
            finished: 0,
            jobs: trace.requests().iter().map(job).collect(),
            groups: Vec::new(),
            flights: Vec::new(),
            free_flights: Vec::new(),
            memory: Memory::new(
                instances,
                instance.memory_bytes(),
                instance.parameter_bytes(),
            ),
            trigger: Trigger::new(setup.options.agree),
            plans: Vec::new(),
            host_free: vec![0.0; instances],
            host_held: vec![0; instances],
            failed: vec![false; instances],
            stranded: VecDeque::new(),
            tally: Tally::new(trace.requests().len()),
        };
        let size = match setup.policy {
            Policy::Pipeline => 2,
            _ => 1,
        };
        let all: Vec<usize> = (0..instances).collect();
        for members in all.chunks(size) {
            simulation.open(members.to_vec());
        }
        simulation
    }

    /// A new group that holds the parameters once.
    fn open(&mut self, members: Vec<usize>) -> usize {
        let n = members.len() as u64;
        let instance = &self.setup.instance;
        let kept = instance.parameter_bytes() - self.way.droppable_bytes
            + self.way.droppable_bytes.div_ceil(n);
        for member in &members {
            self.memory.parameters[*member] = kept;
        }
        let (homes, stages) = match self.way.form {
            Form::Layers => (vec![self.memory.layout(&members)], members.len()),
            Form::Experts => (members.clone(), 1),
        };
        self.tally.largest(members.len());
        self.groups.push(Group {
            alive: true,
            members,
            homes,
            free_at: vec![self.now; stages],
            ..Group::default()
        });
        self.groups.len() - 1
    }

    pub(super) fn run(mut self, watch: &mut dyn FnMut(&Held<'_>)) -> Outcome {
        self.at(self.jobs[0].arrived, Event::Arrive);
        self.at(self.setup.options.poll.as_secs_f64(), Event::Poll);
        for failure in &self.setup.failures {
            let event = Event::Fail(failure.instance as usize);
            self.at(failure.at.as_secs_f64(), event);
        }
        while self.finished < self.jobs.len() {
            let Some(Reverse((at, _, event))) = self.events.pop() else {
                break;
            };
            self.now = f64::from_bits(at);
            self.happen(event);
            watch(&Held {
                at: self.now,
                caches: &self.memory.held,
                parameters: &self.memory.parameters,
            });
        }
        self.outcome()
    }

    fn at(&mut self, at: f64, event: Event) {
        self.events
            .push(Reverse((at.max(self.now).to_bits(), self.number, event)));
        self.number += 1;
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Arrive => self.arrive(),
            Event::Launch(group) => {
                self.groups[group].timer = false;
                self.launch(group);
            }
            Event::Through(flight) => self.through(flight),
            Event::Poll => self.poll(),
            Event::Commit(plan) => self.commit(plan),
            Event::Chunk(group, origin, bytes) => self.chunk(group, origin, bytes),
            Event::Restored(group, number) => self.restored(group, number),
            Event::SwappedOut(job, epoch) => self.swapped_out(job, epoch),
            Event::SwappedIn(job, epoch) => self.swapped_in(job, epoch),
            Event::Migrated(job, epoch) => self.migrated(job, epoch),
            Event::Fail(instance) => self.fail(instance),
            Event::Reloaded(instance) => self.reloaded(instance),
        }
    }

    fn arrive(&mut self) {
        let job = self.next as u32;
        self.next += 1;
        if let Some(request) = self.trace.requests().get(self.next) {
            self.at(request.at.as_secs_f64(), Event::Arrive);
        }
        self.dispatch(job);
    }

    fn job(&mut self, job: u32) -> &mut Job {
        &mut self.jobs[job as usize]
    }

    /// Bytes of a cache of this number of blocks.
    fn bytes(&self, blocks: u32) -> u64 {
        let block = u64::from(self.cache.block_tokens) * self.cache.token_bytes;
        self.cache.sequence_bytes + u64::from(blocks) * block
    }

    fn blocks(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.cache.block_tokens)
    }

    /// Bytes that a waiting job needs.
    fn needed(&self, job: u32) -> u64 {
        self.bytes(self.blocks(self.jobs[job as usize].target))
    }

    /// A group's memory and demand.
    fn demand(&self, group: usize) -> Demand {
        let group = &self.groups[group];
        let sum = |of: &dyn Fn(usize) -> u64| group.members.iter().map(|i| of(*i)).sum::<u64>();
        let limit = sum(&|i| self.memory.limit(i));
        Demand {
            held: sum(&|i| self.memory.held[i]),
            queued: group.queued,
            capacity: limit - (limit as f64 * WATERMARK) as u64,
        }
    }

    /// Dispatches a request to the group with the lowest demand for memory.
    fn dispatch(&mut self, job: u32) {
        let mut best: Option<(f64, usize)> = None;
        for group in 0..self.groups.len() {
            if !self.groups[group].alive {
                continue;
            }
            let demand = self.demand(group);
            let load = (demand.held + demand.queued) as f64 / demand.capacity.max(1) as f64;
            if best.is_none_or(|(least, _)| load < least) {
                best = Some((load, group));
            }
        }
        match best {
            Some((_, group)) => {
                self.enqueue(job, group, false);
                self.kick(group);
            }
            None => self.stranded.push_back(job),
        }
    }

    fn enqueue(&mut self, job: u32, group: usize, front: bool) {
        let needed = self.needed(job);
        let entry = self.job(job);
        (entry.state, entry.group) = (State::Waiting, group);
        let group = &mut self.groups[group];
        group.queued += needed;
        if front {
            group.waiting.push_front(job);
        } else {
            group.waiting.push_back(job);
        }
    }

    /// Lets a group start a step as soon as its first stage is free.
    fn kick(&mut self, number: usize) {
        let group = &mut self.groups[number];
        let full = group.flights.len() >= group.free_at.len();
        if group.alive && !group.closing && !group.timer && !full {
            group.timer = true;
            let at = group.free_at[0];
            self.at(at, Event::Launch(number));
        }
    }

    /// Queues a job with a complete cache at its next stage.
    fn go_on(&mut self, job: u32, number: usize) {
        let entry = &mut self.jobs[job as usize];
        (entry.state, entry.group) = (State::Running, number);
        let group = &mut self.groups[number];
        group.running.insert(job);
        if entry.filled < entry.target {
            group.pending += u64::from(entry.target - entry.filled);
            let place = group.prefill.partition_point(|other| *other < job);
            group.prefill.insert(place, job);
        } else {
            group.decoding += 1;
            group.decode.push_back(job);
        }
        self.kick(number);
    }

    /// Removes an idle job from its group's queues; its memory stays.
    fn withdraw(&mut self, job: u32) {
        let entry = &self.jobs[job as usize];
        let group = &mut self.groups[entry.group];
        group.running.remove(&job);
        if entry.filled < entry.target {
            group.pending -= u64::from(entry.target - entry.filled);
            group.prefill.retain(|other| *other != job);
        } else {
            group.decoding -= 1;
            group.decode.retain(|other| *other != job);
        }
    }

    /// Frees a job's memory.
    fn release(&mut self, job: u32) {
        let (layout, blocks) = {
            let job = &self.jobs[job as usize];
            (job.layout, job.blocks)
        };
        let share = self.memory.share(layout, self.bytes(blocks));
        self.memory.give(layout, share);
        self.job(job).blocks = 0;
    }

    /// Resets a job without a cache to the work that it has to do again.
    fn forget(&mut self, job: u32) {
        let entry = self.job(job);
        let lost = entry.filled;
        entry.target = entry.prompt + entry.done;
        (entry.filled, entry.flying) = (0, 0);
        entry.epoch += 1;
        self.tally.counts.recomputed += 1;
        self.tally.counts.recomputed_tokens += u64::from(lost);
    }
}
