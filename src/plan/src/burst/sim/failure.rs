//! The failure of an instance.
//!
//! Requests with a part of their cache there are prefilled again on other instances. The other members of its group lack its
//! layers or experts: they load what they lack, from another group or from host memory, and continue as single instances.

use super::{Event, Simulation, State};

impl Simulation<'_> {
    pub(super) fn fail(&mut self, instance: usize) {
        if std::mem::replace(&mut self.failed[instance], true) {
            return;
        }
        let holds = |group: &usize| {
            let group = &self.groups[*group];
            group.alive && group.members.contains(&instance)
        };
        let group = (0..self.groups.len()).find(holds);
        let mut lost = self.lost(instance, group);
        lost.sort_unstable();
        if let Some(number) = group {
            self.close_down(number, instance);
        }
        self.memory.parameters[instance] = self.setup.instance.memory_bytes();
        for job in lost {
            self.dispatch(job);
        }
    }

    /// Removes all requests of a group, and all with a part of their cache on an instance.
    fn lost(&mut self, instance: usize, group: Option<usize>) -> Vec<u32> {
        let mut lost = Vec::new();
        for number in 0..self.groups.len() {
            if !self.groups[number].alive {
                continue;
            }
            let all = Some(number) == group;
            for job in self.groups[number].running.clone() {
                let entry = &self.jobs[job as usize];
                let (state, to) = (entry.state, entry.to);
                let there = self.memory.members(entry.layout).contains(&instance);
                if state == State::Migrating && Some(to) == group && !all {
                    self.stay(number, job);
                } else if all || there {
                    self.lose(number, job);
                    lost.push(job);
                }
            }
        }
        if let Some(number) = group {
            let swapped: Vec<u32> = self.groups[number].swapped.drain(..).collect();
            for job in &swapped {
                self.job(*job).blocks = 0;
                self.forget(*job);
            }
            self.host_held[instance] = 0;
            lost.extend(swapped);
            lost.extend(self.groups[number].waiting.drain(..));
            self.groups[number].queued = 0;
        }
        lost
    }

    /// Removes a job and its memory from a group, in any state.
    fn lose(&mut self, number: usize, job: u32) {
        let entry = &self.jobs[job as usize];
        let bytes = self.bytes(entry.blocks);
        match entry.state {
            State::Running if entry.flying == 0 => self.withdraw(job),
            State::Migrating => {
                let home = self.groups[entry.to].homes[0];
                self.memory.give(home, bytes);
                self.groups[number].leaving = false;
            }
            State::Leaving => self.groups[number].leaving = false,
            _ => {}
        }
        self.groups[number].running.remove(&job);
        self.release(job);
        self.forget(job);
    }

    /// A cache whose destination has failed stays where it is.
    fn stay(&mut self, number: usize, job: u32) {
        let entry = &self.jobs[job as usize];
        let (to, bytes) = (entry.to, self.bytes(entry.blocks));
        let home = self.groups[to].homes[0];
        self.memory.give(home, bytes);
        self.job(job).epoch += 1;
        self.groups[number].leaving = false;
        self.go_on(job, number);
    }

    /// Ends a group; its other members load what they lack.
    fn close_down(&mut self, number: usize, instance: usize) {
        let group = &mut self.groups[number];
        group.alive = false;
        let plan = group.plan.take();
        let restoring = group.restoring;
        let members = group.members.clone();
        if let Some(plan) = plan {
            for other in std::mem::take(&mut self.plans[plan]) {
                if other != number {
                    self.groups[other].plan = None;
                    self.groups[other].closing = false;
                    self.kick(other);
                }
            }
        }
        let network = self.setup.instance.network();
        let elsewhere = self.groups.iter().any(|group| group.alive);
        let rate = if elsewhere {
            network.bytes_per_second
        } else {
            network.host_bytes_per_second
        };
        let all = self.way.droppable_bytes;
        let missing = all - all.div_ceil(members.len() as u64);
        for member in members {
            if member == instance {
                continue;
            }
            if !restoring {
                self.memory.parameters[member] += missing;
            }
            self.tally.counts.restored_bytes += missing;
            self.at(self.now + missing as f64 / rate, Event::Reloaded(member));
        }
    }

    pub(super) fn reloaded(&mut self, instance: usize) {
        if self.failed[instance] {
            return;
        }
        self.open(vec![instance]);
        for job in std::mem::take(&mut self.stranded) {
            self.dispatch(job);
        }
    }
}
