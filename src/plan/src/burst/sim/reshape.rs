//! Groups that merge and split, and exchanges of caches.

use super::super::Policy;
use super::super::drop;
use super::super::exchange::Exchange;
use super::super::instance::Form;
use super::super::outcome::Sample;
use super::super::trigger::{Demand, restores};
use super::{Event, Move, Simulation, State};

/// Seconds of a stage before any has run: for the first chunk of an exchange.
const STAGE_SECONDS: f64 = 0.05;

impl Simulation<'_> {
    /// Polls the demand.
    pub(super) fn poll(&mut self) {
        let poll = self.setup.options.poll.as_secs_f64();
        self.at(self.now + poll, Event::Poll);
        let (mut demand, mut capacity) = (0, 0);
        for group in 0..self.groups.len() {
            if self.groups[group].alive {
                let here = self.demand(group);
                demand += here.held + here.queued;
                capacity += here.capacity;
            }
        }
        let sample = Sample {
            at: self.now,
            demand_bytes: demand,
            capacity_bytes: capacity,
            waiting: self.groups.iter().map(|group| group.waiting.len()).sum(),
            groups: self
                .groups
                .iter()
                .filter(|group| group.alive && group.members.len() > 1)
                .count(),
        };
        self.tally.sample(sample);
        for group in 0..self.groups.len() {
            if self.groups[group].alive {
                self.unstick(group);
                // Another group's exchange may have freed memory on an instance.
                self.kick(group);
            }
        }
        if self.setup.policy == Policy::Drop {
            self.consider_drop();
            self.consider_restore();
        }
    }

    /// Drops parameters if demand requires it: restores are cancelled first, then groups merge.
    fn consider_drop(&mut self) {
        let alive = (0..self.groups.len()).filter(|group| self.groups[*group].alive);
        let alive: Vec<usize> = alive.collect();
        // One plan at a time: what it frees is not yet available.
        if alive.iter().any(|group| self.groups[*group].plan.is_some()) {
            return;
        }
        let demands: Vec<_> = alive.iter().map(|group| self.pressing(*group)).collect();
        let Some(mut missing) = self.trigger.look(demands.iter().copied()) else {
            return;
        };
        for (group, demand) in alive.iter().zip(&demands) {
            if self.groups[*group].restoring && demand.missing() > 0 {
                missing = missing.saturating_sub(self.call_off(*group));
            }
        }
        let free = |group: &usize| {
            let group = &self.groups[*group];
            !group.closing && !group.restoring && group.moves.is_empty()
        };
        let free: Vec<usize> = alive.into_iter().filter(free).collect();
        let size = |group: &usize| self.groups[*group].members.len() as u32;
        let sizes: Vec<u32> = free.iter().map(size).collect();
        let most = self.setup.options.most_members;
        let plan = drop::plan(&sizes, self.way.droppable_bytes, missing, most);
        for set in plan.merges {
            let set: Vec<usize> = set.into_iter().map(|place| free[place]).collect();
            let number = self.plans.len();
            for group in &set {
                self.groups[*group].closing = true;
                self.groups[*group].plan = Some(number);
            }
            self.plans.push(set);
            self.commit_if_drained(number);
        }
    }

    /// A group's demand as counted by the trigger.
    fn pressing(&self, number: usize) -> Demand {
        let demand = self.demand(number);
        let first = self.groups[number].waiting.front();
        let fits = first.is_none_or(|job| self.home(number, self.needed(*job)).is_some());
        if self.setup.options.for_memory && fits {
            return Demand {
                queued: 0,
                ..demand
            };
        }
        demand
    }

    /// Cancels a restore; returns the bytes that are free again.
    fn call_off(&mut self, number: usize) -> u64 {
        let group = &mut self.groups[number];
        if group.closing {
            return 0;
        }
        group.restoring = false;
        group.restores += 1;
        let n = group.members.len() as u64;
        let all = self.way.droppable_bytes;
        for member in self.groups[number].members.clone() {
            self.memory.parameters[member] -= all - all.div_ceil(n);
        }
        self.kick(number);
        all * (n - 1)
    }

    /// A group that is closing has no running step left.
    pub(super) fn drained(&mut self, number: usize) {
        match self.groups[number].plan {
            Some(plan) => self.commit_if_drained(plan),
            None => self.split(number),
        }
    }

    fn commit_if_drained(&mut self, plan: usize) {
        let drained = |group: &usize| self.groups[*group].flights.is_empty();
        if self.plans[plan].iter().all(drained) {
            let at = self.now + self.setup.options.drop_time.as_secs_f64();
            self.at(at, Event::Commit(plan));
        }
    }

    /// Merges the groups of a plan.
    pub(super) fn commit(&mut self, plan: usize) {
        let set = self.plans[plan].clone();
        // A member may have failed in the meantime.
        if set.len() < 2 || !self.groups[set[0]].alive {
            return;
        }
        self.tally.counts.drops += set.len() as u64 - 1;
        let mut members: Vec<usize> = Vec::new();
        let (mut waiting, mut jobs): (Vec<u32>, Vec<(usize, u32)>) = (Vec::new(), Vec::new());
        let mut stage_seconds = STAGE_SECONDS;
        for number in &set {
            let group = &mut self.groups[*number];
            group.alive = false;
            members.extend(&group.members);
            waiting.extend(&group.waiting);
            jobs.extend(group.running.iter().map(|job| (group.homes[0], *job)));
            if group.stage_seconds > 0.0 {
                stage_seconds = group.stage_seconds;
            }
        }
        members.sort_unstable();
        waiting.sort_unstable();
        jobs.sort_unstable();
        let new = self.open(members);
        self.groups[new].stage_seconds = stage_seconds;
        for job in waiting {
            self.enqueue(job, new, false);
        }
        match self.way.form {
            Form::Experts => {
                for (_, job) in jobs {
                    self.go_on(job, new);
                }
            }
            Form::Layers => {
                let origins: Vec<usize> =
                    set.iter().map(|old| self.groups[*old].homes[0]).collect();
                for origin in origins {
                    let from = jobs.iter().filter(|(layout, _)| *layout == origin);
                    let jobs: Vec<u32> = from.map(|(_, job)| *job).collect();
                    self.exchange(new, origin, &jobs);
                }
            }
        }
        self.kick(new);
    }

    /// Splits a group whose parameters are restored into its members.
    fn split(&mut self, number: usize) {
        self.tally.counts.restores += 1;
        let group = &mut self.groups[number];
        group.alive = false;
        let (members, stage_seconds) = (group.members.clone(), group.stage_seconds);
        let waiting: Vec<u32> = group.waiting.drain(..).collect();
        let running: Vec<u32> = std::mem::take(&mut group.running).into_iter().collect();
        let origin = group.homes[0];
        let mut given: Vec<(u64, Vec<u32>)> = vec![(0, Vec::new()); members.len()];
        for job in running {
            let entry = &self.jobs[job as usize];
            let bytes = self.bytes(entry.blocks);
            let place = match self.way.form {
                Form::Experts => members.iter().position(|member| *member == entry.layout),
                Form::Layers => (0..members.len()).min_by_key(|place| given[*place].0),
            };
            let place = &mut given[place.unwrap_or(0)];
            place.0 += bytes;
            place.1.push(job);
        }
        for (member, (_, jobs)) in members.into_iter().zip(given) {
            let new = self.open(vec![member]);
            self.groups[new].stage_seconds = stage_seconds;
            match self.way.form {
                Form::Experts => jobs.into_iter().for_each(|job| self.go_on(job, new)),
                Form::Layers => self.exchange(new, origin, &jobs),
            }
        }
        for job in waiting {
            self.dispatch(job);
        }
    }

    /// Exchanges caches of `origin` to a group's layout, in order of arrival.
    fn exchange(&mut self, number: usize, origin: usize, jobs: &[u32]) {
        let target = self.groups[number].homes[0];
        let (from, to) = (self.memory.members(origin), self.memory.members(target));
        let both = from.iter().filter(|member| to.contains(member)).count() as f64;
        let (out, into) = (from.len() as f64, to.len() as f64);
        // A member of both layouts keeps the layers that it has in both.
        let moved = 1.0 - both * (1.0 / out).min(1.0 / into);
        let links = out.min(into - both).max(1.0);
        let mut requests = Vec::new();
        let mut reserve = self.groups[number].reserve;
        for job in jobs {
            let bytes = self.bytes(self.jobs[*job as usize].blocks);
            reserve = reserve.max(self.memory.share(target, bytes));
            requests.push((*job, (bytes as f64 * moved) as u64));
            let entry = self.job(*job);
            (entry.state, entry.group) = (State::Moving, number);
        }
        let rate = self.setup.instance.network().bytes_per_second * links;
        let group = &mut self.groups[number];
        group.running.extend(jobs);
        if requests.is_empty() {
            return;
        }
        group.reserve = reserve;
        if group.moves.is_empty() {
            group.moves_began = self.now;
        }
        let exchange = Exchange::new(requests);
        if !self.setup.options.coordinated {
            let end = self.now + exchange.left() as f64 / rate;
            group.blocked_until = group.blocked_until.max(end);
        }
        group.moves.push(Move {
            origin,
            exchange,
            rate,
            stalled: false,
        });
        self.send(number, origin);
    }

    /// Sends the next chunk.
    fn send(&mut self, number: usize, origin: usize) {
        let coordinated = self.setup.options.coordinated;
        let group = &self.groups[number];
        let Some(one) = group.moves.iter().find(|one| one.origin == origin) else {
            return;
        };
        let seconds = match group.stage_seconds {
            stage if stage > 0.0 => stage,
            _ => STAGE_SECONDS,
        };
        // No step is running, so no activations are sent.
        let activations = if group.flights.is_empty() {
            0.0
        } else {
            group.activation_bytes
        };
        let bytes = if coordinated {
            one.exchange.chunk(seconds, one.rate, activations)
        } else {
            one.exchange.left()
        };
        let beside = if coordinated { activations } else { 0.0 };
        let end = self.now + (bytes as f64 + beside) / one.rate;
        self.at(end, Event::Chunk(number, origin, bytes));
    }

    pub(super) fn chunk(&mut self, number: usize, origin: usize, bytes: u64) {
        self.tally.counts.exchanged_bytes += bytes;
        if !self.groups[number].alive {
            return;
        }
        let moves = &mut self.groups[number].moves;
        if let Some(one) = moves.iter_mut().find(|one| one.origin == origin) {
            one.exchange.sent(bytes);
        }
        self.land(number, origin);
    }

    /// Lets caches that have arrived continue in their new layout, and sends the next chunk.
    fn land(&mut self, number: usize, origin: usize) {
        loop {
            let moves = &mut self.groups[number].moves;
            let Some(place) = moves.iter().position(|one| one.origin == origin) else {
                return;
            };
            if moves[place].exchange.is_done() {
                moves.remove(place);
                if moves.is_empty() {
                    let began = self.groups[number].moves_began;
                    self.tally.exchanges.push(self.now - began);
                    self.groups[number].reserve = 0;
                    self.kick(number);
                }
                return;
            }
            let Some(job) = moves[place].exchange.across() else {
                moves[place].stalled = false;
                return self.send(number, origin);
            };
            // After a failure there it does not exist any more.
            let here = {
                let job = &self.jobs[job as usize];
                job.state == State::Moving && job.group == number
            };
            if here && !self.flip(number, job) {
                self.groups[number].moves[place].stalled = true;
                return;
            }
            self.groups[number].moves[place].exchange.pop();
        }
    }

    /// Moves a cache's memory to its group's layout; false if there is not enough.
    fn flip(&mut self, number: usize, job: u32) -> bool {
        let home = self.groups[number].homes[0];
        let (old, blocks) = {
            let entry = &self.jobs[job as usize];
            (entry.layout, entry.blocks)
        };
        let bytes = self.bytes(blocks);
        let (before, after) = (
            self.memory.share(old, bytes),
            self.memory.share(home, bytes),
        );
        self.memory.give(old, before);
        if !self.memory.take(home, after) {
            self.memory.take(old, before);
            return false;
        }
        self.job(job).layout = home;
        self.go_on(job, number);
        true
    }

    /// Tries again to allocate caches that have arrived without memory for them.
    pub(super) fn resume(&mut self, number: usize) {
        let stalled = |one: &&Move| one.stalled;
        let origins = self.groups[number].moves.iter().filter(stalled);
        let origins: Vec<usize> = origins.map(|one| one.origin).collect();
        for origin in origins {
            self.land(number, origin);
        }
    }

    /// The same; if no running step could free memory, one of them is given up.
    fn unstick(&mut self, number: usize) {
        self.resume(number);
        let group = &self.groups[number];
        let idle = group.flights.is_empty() && group.decode.is_empty() && group.prefill.is_empty();
        let stalled = group.moves.iter().find(|one| one.stalled);
        let Some(job) = stalled
            .and_then(|one| one.exchange.across())
            .filter(|_| idle)
        else {
            return;
        };
        self.groups[number].running.remove(&job);
        self.release(job);
        self.forget(job);
        self.enqueue(job, number, true);
        self.resume(number);
    }

    /// Restores groups whose caches use little memory.
    fn consider_restore(&mut self) {
        let options = &self.setup.options;
        let room = self.setup.instance.cache_bytes();
        let all = self.way.droppable_bytes;
        let rate = self.setup.instance.network().bytes_per_second;
        for number in 0..self.groups.len() {
            let group = &self.groups[number];
            let n = group.members.len() as u64;
            let busy = group.closing || group.restoring || !group.moves.is_empty();
            if !group.alive || !options.restore || n < 2 || busy {
                continue;
            }
            let demand = self.demand(number);
            let fits = group.members.iter().all(|i| self.memory.held[*i] <= room);
            if !fits || !restores(&demand, n * room, options.restore_below) {
                continue;
            }
            let missing = all - all.div_ceil(n);
            for member in group.members.clone() {
                self.memory.parameters[member] += missing;
            }
            self.tally.counts.restored_bytes += n * missing;
            let group = &mut self.groups[number];
            group.restoring = true;
            let restores = group.restores;
            let at = self.now + missing as f64 / rate;
            self.at(at, Event::Restored(number, restores));
        }
    }

    pub(super) fn restored(&mut self, number: usize, restores: u32) {
        let group = &mut self.groups[number];
        if !group.alive || !group.restoring || group.restores != restores {
            return;
        }
        group.closing = true;
        if group.flights.is_empty() {
            self.split(number);
        }
    }
}
