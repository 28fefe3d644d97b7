//! Frees memory when a sequence needs a block and none is free: recompute, swap, migrate.

use super::super::Policy;
use super::{Event, Simulation, State, WATERMARK};

impl Simulation<'_> {
    /// Frees memory for `job`: the idle sequence that arrived last gives up its cache. Returns false if the job has to wait,
    /// or was that sequence itself.
    pub(super) fn relieve(&mut self, number: usize, job: u32) -> bool {
        if self.setup.policy == Policy::Swap && self.groups[number].leaving {
            return false;
        }
        let layout = self.jobs[job as usize].layout;
        let running = self.groups[number].running.iter().rev();
        let candidate = |other: &&u32| {
            let other = &self.jobs[**other as usize];
            other.state == State::Running && other.layout == layout
        };
        let mut later_in_steps = false;
        let mut victim = None;
        for other in running.filter(candidate) {
            if self.jobs[*other as usize].flying == 0 {
                victim = Some(*other);
                break;
            }
            later_in_steps |= *other > job;
        }
        let Some(victim) = victim else {
            return false;
        };
        // A later sequence that is in a step will be the one to give up when the step ends.
        if victim == job && later_in_steps {
            return false;
        }
        if self.setup.policy == Policy::Swap && self.swap_out(number, victim) {
            return false;
        }
        self.preempt(number, victim);
        victim != job
    }

    /// Frees a cache; its request waits at the front of the queue.
    pub(super) fn preempt(&mut self, number: usize, victim: u32) {
        self.withdraw(victim);
        self.release(victim);
        self.forget(victim);
        self.enqueue(victim, number, true);
    }

    /// Starts a copy of a cache to host memory; false if that is full.
    fn swap_out(&mut self, number: usize, victim: u32) -> bool {
        let instance = self.groups[number].members[0];
        let bytes = self.bytes(self.jobs[victim as usize].blocks);
        if self.host_held[instance] + bytes > self.setup.options.host_bytes {
            return false;
        }
        self.host_held[instance] += bytes;
        self.withdraw(victim);
        self.job(victim).state = State::Leaving;
        self.groups[number].running.insert(victim);
        self.groups[number].leaving = true;
        self.tally.counts.swapped += 1;
        let at = self.host_copy(instance, bytes);
        let epoch = self.jobs[victim as usize].epoch;
        self.at(at, Event::SwappedOut(victim, epoch));
        true
    }

    /// The time at which `bytes` more have been copied between an instance and its host.
    fn host_copy(&mut self, instance: usize, bytes: u64) -> f64 {
        let rate = self.setup.instance.network().host_bytes_per_second;
        let end = self.host_free[instance].max(self.now) + bytes as f64 / rate;
        self.host_free[instance] = end;
        end
    }

    pub(super) fn swapped_out(&mut self, job: u32, epoch: u32) {
        if self.jobs[job as usize].epoch != epoch {
            return;
        }
        let number = self.jobs[job as usize].group;
        let blocks = self.jobs[job as usize].blocks;
        self.release(job);
        let entry = self.job(job);
        (entry.state, entry.blocks) = (State::Swapped, blocks);
        let group = &mut self.groups[number];
        group.running.remove(&job);
        group.leaving = false;
        group.swapped.push_back(job);
        self.kick(number);
    }

    /// Starts a copy of a cache back to the device, if there is memory for it and for one more block.
    pub(super) fn swap_in(&mut self, number: usize, job: u32) -> bool {
        let blocks = self.jobs[job as usize].blocks;
        let Some(home) = self.home(number, self.bytes(blocks + 1)) else {
            return false;
        };
        let bytes = self.bytes(blocks);
        let share = self.memory.share(home, bytes);
        if !self.memory.take(home, share) {
            return false;
        }
        let entry = self.job(job);
        (entry.state, entry.layout) = (State::Returning, home);
        let epoch = entry.epoch;
        let group = &mut self.groups[number];
        group.swapped.pop_front();
        group.running.insert(job);
        let instance = group.members[0];
        let at = self.host_copy(instance, bytes);
        self.at(at, Event::SwappedIn(job, epoch));
        true
    }

    pub(super) fn swapped_in(&mut self, job: u32, epoch: u32) {
        let entry = &self.jobs[job as usize];
        if entry.epoch != epoch {
            return;
        }
        let (number, bytes) = (entry.group, self.bytes(entry.blocks));
        let instance = self.groups[number].members[0];
        self.host_held[instance] -= bytes;
        self.go_on(job, number);
    }

    /// If a group's next request does not fit, or its free memory is below twice the watermark, moves the sequence that
    /// arrived last to the group with the most free memory, if that has a twentieth of its memory left afterwards.
    pub(super) fn migrate(&mut self, number: usize) {
        let group = &self.groups[number];
        let home = group.homes[0];
        let limit = self.memory.limit(group.members[0]) as f64;
        let tight = (self.memory.room(home) as f64) < 2.0 * WATERMARK * limit;
        let blocked = group
            .waiting
            .front()
            .is_some_and(|job| self.home(number, self.needed(*job)).is_none());
        if group.leaving || !(tight || blocked) {
            return;
        }
        let idle = |job: &&u32| {
            let job = &self.jobs[**job as usize];
            job.state == State::Running && job.flying == 0 && job.filled >= job.target
        };
        let Some(job) = group.running.iter().rev().find(idle).copied() else {
            return;
        };
        let others = (0..self.groups.len()).filter(|other| *other != number);
        let alive = others.filter(|other| self.groups[*other].alive);
        let room = |other: &usize| self.memory.room(self.groups[*other].homes[0]);
        let Some(to) = alive.max_by_key(room) else {
            return;
        };
        let bytes = self.bytes(self.jobs[job as usize].blocks);
        let there = self.groups[to].homes[0];
        if (room(&to) as f64) < bytes as f64 + 0.05 * limit || !self.memory.take(there, bytes) {
            return;
        }
        self.withdraw(job);
        let entry = self.job(job);
        (entry.state, entry.to) = (State::Migrating, to);
        let epoch = entry.epoch;
        let group = &mut self.groups[number];
        group.running.insert(job);
        group.leaving = true;
        let rate = self.setup.instance.network().bytes_per_second;
        self.at(self.now + bytes as f64 / rate, Event::Migrated(job, epoch));
    }

    pub(super) fn migrated(&mut self, job: u32, epoch: u32) {
        let entry = &self.jobs[job as usize];
        if entry.epoch != epoch {
            return;
        }
        let (from, to, blocks) = (entry.group, entry.to, entry.blocks);
        self.release(job);
        let group = &mut self.groups[from];
        group.running.remove(&job);
        group.leaving = false;
        let home = self.groups[to].homes[0];
        let entry = self.job(job);
        (entry.blocks, entry.layout) = (blocks, home);
        self.tally.counts.migrated += 1;
        self.go_on(job, to);
        self.kick(from);
    }
}
