//! Groups of replicas, and how their parameters are dropped and restored: moves of layers, and pools of other sizes.
//!
//! A replica alone is a group of one. What was done of a change is known at every moment, so that one that fails in the middle can be
//! taken back.

use std::sync::Arc;
use std::time::Instant;

use super::homes::{Homes, Move, moves};
use super::members::{Members, Result, stopped};
use super::sizes::{Budget, Ledger, PoolSizes, StateSizes};
use super::state::{Clock, ParameterState, Parameters, ReplicaParameters};
use crate::backend::{Caches, MemoryUse, Replicas};
use crate::engine::Status;
use crate::error::{EngineError, Error};

/// How often in a row a replica may fail without its device being lost.
const MOST_ERRORS: u32 = 3;

/// Replicas that share parameters, or one that does not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Group {
    /// In ascending order.
    pub(super) members: Vec<usize>,
    /// How a change of the group ended that was not completed.
    unfinished: Option<Caches>,
}

impl Group {
    fn of(members: Vec<usize>) -> Self {
        Self {
            members,
            unfinished: None,
        }
    }

    /// Whether its members share parameters.
    pub(super) fn is_dropped(&self) -> bool {
        self.members.len() > 1
    }
}

/// One replica.
struct Member {
    homes: Homes,
    sizes: PoolSizes,
    clock: Clock,
    /// Whether its device or its engine is gone.
    lost: bool,
    /// Number of consecutive looks at which its engine had failed.
    errors: u32,
}

/// All replicas, as groups.
pub(super) struct Groups {
    devices: Arc<Replicas>,
    budget: Budget,
    sizes: StateSizes,
    groups: Vec<Group>,
    members: Vec<Member>,
    drops: u64,
    restores: u64,
    failures: u64,
}

impl Groups {
    /// Replicas that hold all parameters and have pools of the size for that.
    pub(super) fn new(devices: Arc<Replicas>, budget: Budget, sizes: StateSizes) -> Self {
        let replicas: Vec<usize> = (0..budget.replicas).collect();
        let now = Instant::now();
        let members = budget.whole(&replicas).into_iter().map(|homes| Member {
            homes,
            sizes: sizes.whole,
            clock: Clock::new(now),
            lost: false,
            errors: 0,
        });
        Self {
            members: members.collect(),
            groups: replicas.iter().map(|it| Group::of(vec![*it])).collect(),
            devices,
            budget,
            sizes,
            drops: 0,
            restores: 0,
            failures: 0,
        }
    }

    pub(super) fn devices(&self) -> &Arc<Replicas> {
        &self.devices
    }

    pub(super) fn all(&self) -> &[Group] {
        &self.groups
    }

    /// Bytes of a copy of what a merge drops, and the most members of a group.
    pub(super) fn copy_and_most(&self) -> (u64, u32) {
        let most = self.sizes.dropped.keys().last().copied().unwrap_or(1);
        (self.budget.copy_bytes(), most as u32)
    }

    /// Bytes of slots and of blocks of a replica that holds all parameters.
    pub(super) fn whole_bytes(&self) -> [u64; 2] {
        let [slot, block] = self.budget.unit_bytes();
        let PoolSizes { slots, blocks } = self.sizes.whole;
        [slot * slots as u64, block * blocks as u64]
    }

    /// The replicas that work, and their status. It waits for a step of each.
    pub(super) fn statuses(&self, shared: &dyn Members) -> Vec<Option<Status>> {
        let each = self.members.iter().enumerate();
        let status = |(replica, member): (usize, &Member)| {
            let working = (!member.lost).then(|| shared.engine(replica).status());
            working.flatten()
        };
        each.map(status).collect()
    }

    /// The parameters of all replicas, at this time.
    pub(super) fn parameters(&self, now: Instant) -> Parameters {
        let each = self.members.iter().enumerate();
        let replica = |(replica, member): (usize, &Member)| ReplicaParameters {
            state: member.clock.state(),
            group: self
                .group_of(replica)
                .map(|group| group.members.clone())
                .unwrap_or_default(),
            slots: member.sizes.slots,
            blocks: member.sizes.blocks,
            memory: MemoryUse::default(),
            seconds: member.clock.seconds(now),
        };
        Parameters {
            form: self.budget.form,
            replicas: each.map(replica).collect(),
            drops: self.drops,
            restores: self.restores,
            failures: self.failures,
            migrated: 0,
        }
    }

    /// The group of a replica; `None` for one that is lost.
    fn group_of(&self, replica: usize) -> Option<&Group> {
        self.groups.iter().find(|it| it.members.contains(&replica))
    }

    /// A group whose change was not completed.
    pub(super) fn unfinished(&self) -> Option<usize> {
        let unfinished = |group: &Group| group.unfinished.is_some();
        self.groups.iter().position(unfinished)
    }

    /// Replicas whose device or engine is gone since the last call.
    pub(super) fn gone(&self, shared: &dyn Members) -> Vec<usize> {
        let gone = |replica: &usize| {
            !self.members[*replica].lost
                && (self.devices.lost(*replica) || !shared.engine(*replica).is_running())
        };
        (0..self.members.len()).filter(gone).collect()
    }

    /// Has engines go on that have failed because of another one's device, or for a moment; returns those that fail again and again.
    pub(super) fn resume(
        &mut self,
        shared: &dyn Members,
        statuses: &[Option<Status>],
    ) -> Vec<usize> {
        let mut failing = Vec::new();
        for (replica, status) in statuses.iter().enumerate() {
            let Some(status) = status else { continue };
            // The rest of a group goes on when all of its layers are at home.
            let group = self.group_of(replica);
            if group.is_none_or(|group| group.unfinished.is_some()) {
                continue;
            }
            let member = &mut self.members[replica];
            if !status.suspended {
                member.errors = 0;
                continue;
            }
            member.errors += 1;
            if member.errors > MOST_ERRORS {
                failing.push(replica);
            } else {
                let _ = shared.engine(replica).resume();
            }
        }
        failing
    }

    /// Merges these groups, which drop all but one copy of their duplicates, and grows their pools.
    ///
    /// # Errors
    /// Groups that cannot be merged. An engine or a device that fails: the group is unfinished then, and is to be restored.
    pub(super) fn merge(&mut self, shared: &dyn Members, groups: &[usize]) -> Result<()> {
        let mut members: Vec<usize> = Vec::new();
        for index in groups {
            members.extend(&self.groups[*index].members);
        }
        members.sort_unstable();
        let refused = |reason: String| Err(Arc::new(EngineError::ParameterDrop { reason }.into()));
        let Some(sizes) = self.sizes.dropped.get(&members.len()).copied() else {
            let count = members.len();
            return refused(format!(
                "a group of {count} replicas would have no larger pools"
            ));
        };
        let to = self.budget.dropped(&members);
        let rounds = moves(&members, &self.homes(&members), &to);
        let peak = self.peak(&members, &rounds);
        if peak > self.budget.memory {
            let memory = self.budget.memory;
            return refused(format!(
                "the change would take {peak} bytes of a device, and {memory} are allowed"
            ));
        }
        let kept = self.groups.iter().enumerate();
        let kept = kept.filter(|(index, _)| !groups.contains(index));
        self.groups = kept.map(|(_, group)| group.clone()).collect();
        self.groups.push(Group {
            members: members.clone(),
            unfinished: Some(Caches::Keep),
        });
        let start = self.set_state(shared, &members, ParameterState::Dropping);
        self.make(shared, rounds, Caches::Keep)?;
        let moved = start.elapsed();
        for member in &members {
            self.resize(shared, *member, sizes)?;
        }
        self.set_unfinished(&members, None);
        self.set_state(shared, &members, ParameterState::Dropped);
        self.drops += 1;
        let PoolSizes { slots, blocks } = sizes;
        tracing::info!(
            "replicas {members:?} dropped {} in {:.3} s (moves {:.3} s): {slots} slots and {blocks} blocks each",
            self.budget.form.name(),
            start.elapsed().as_secs_f64(),
            moved.as_secs_f64()
        );
        Ok(())
    }

    /// Shrinks the pools of a group and has each member hold all parameters.
    ///
    /// # Errors
    /// An engine or a device that fails: the group is unfinished then.
    pub(super) fn restore(&mut self, shared: &dyn Members, index: usize) -> Result<()> {
        let group = self.groups[index].clone();
        let caches = group.unfinished.unwrap_or(Caches::Keep);
        let members = group.members;
        let start = self.set_state(shared, &members, ParameterState::Restoring);
        self.set_unfinished(&members, Some(caches));
        if caches == Caches::Discard {
            // Nothing of the caches is kept: pools shrink without moving anything.
            for member in &members {
                shared.engine(*member).recompute_all()?;
            }
        }
        for member in &members {
            self.resize(shared, *member, self.sizes.whole)?;
        }
        let rounds = moves(
            &members,
            &self.homes(&members),
            &self.budget.whole(&members),
        );
        self.make(shared, rounds, caches)?;
        for member in &members {
            shared.engine(*member).resume()?;
        }
        self.set_state(shared, &members, ParameterState::Whole);
        self.groups.retain(|group| group.members != members);
        self.groups
            .extend(members.iter().map(|it| Group::of(vec![*it])));
        self.restores += 1;
        tracing::info!(
            "replicas {members:?} restored {} in {:.3} s",
            self.budget.form.name(),
            start.elapsed().as_secs_f64()
        );
        Ok(())
    }

    /// A replica is gone: its requests go on at others, and the rest of its group holds all parameters again, without the caches.
    ///
    /// # Errors
    /// Another engine or device of the group that fails: the group is unfinished then.
    pub(super) fn lose(&mut self, shared: &dyn Members, replica: usize) -> Result<()> {
        let member = &mut self.members[replica];
        if std::mem::replace(&mut member.lost, true) {
            return Ok(());
        }
        tracing::error!("replica {replica} is lost: its requests go on at others");
        self.failures += 1;
        self.devices.lose(replica);
        // Its engine ends, too: what it has on the devices of others is free then.
        shared.end(replica);
        let now = Instant::now();
        self.members[replica].clock.set(ParameterState::Lost, now);
        let index = self
            .groups
            .iter()
            .position(|it| it.members.contains(&replica));
        let Some(index) = index else {
            return Ok(());
        };
        let group = self.groups.remove(index);
        let left: Vec<usize> = group
            .members
            .into_iter()
            .filter(|it| *it != replica)
            .collect();
        if left.is_empty() {
            return Ok(());
        }
        // What it shared is with nobody now.
        self.groups.push(Group {
            members: left,
            unfinished: Some(Caches::Discard),
        });
        self.restore(shared, self.groups.len() - 1)
    }

    /// A replica is not there yet.
    #[cfg(feature = "transfer")]
    pub(super) fn without(mut self, replica: usize) -> Self {
        self.devices.lose(replica);
        let member = &mut self.members[replica];
        member.lost = true;
        member.clock.set(ParameterState::Lost, Instant::now());
        self.groups
            .retain(|group| !group.members.contains(&replica));
        self
    }

    /// Whether a replica that was lost can be taken in.
    pub(super) fn lacks(&self, replica: usize) -> bool {
        self.members[replica].lost && self.unfinished().is_none()
    }

    /// A replica that was lost is there, and holds all parameters.
    pub(super) fn found(&mut self, replica: usize) {
        let homes = self.budget.whole(&[replica]);
        let member = &mut self.members[replica];
        member.lost = false;
        member.errors = 0;
        member.sizes = self.sizes.whole;
        member.homes = homes.into_iter().flatten().collect();
        member.clock.set(ParameterState::Whole, Instant::now());
        self.groups.push(Group::of(vec![replica]));
        tracing::info!("replica {replica} is there");
    }

    fn homes(&self, members: &[usize]) -> Vec<Homes> {
        let homes = |member: &usize| self.members[*member].homes.clone();
        members.iter().map(homes).collect()
    }

    /// The most bytes that a device holds during these moves.
    fn peak(&self, members: &[usize], rounds: &[Vec<Move>]) -> u64 {
        let sizes: Vec<_> = members.iter().map(|it| self.members[*it].sizes).collect();
        let mut ledger = Ledger::new(&self.budget, members, &self.homes(members), &sizes);
        ledger.play(rounds);
        ledger.peak()
    }

    fn set_state(
        &mut self,
        shared: &dyn Members,
        members: &[usize],
        state: ParameterState,
    ) -> Instant {
        let now = Instant::now();
        for member in members {
            let of = &mut self.members[*member];
            of.clock.set(state, now);
            shared.engine(*member).note(state, of.sizes);
        }
        now
    }

    fn set_unfinished(&mut self, members: &[usize], unfinished: Option<Caches>) {
        for group in &mut self.groups {
            if group.members == members {
                group.unfinished = unfinished;
            }
        }
    }

    /// Makes moves: those of a round at the same time, each by its replica's engine between two steps.
    fn make(&mut self, shared: &dyn Members, rounds: Vec<Vec<Move>>, caches: Caches) -> Result<()> {
        for round in rounds {
            let made = std::thread::scope(|scope| {
                let placing: Vec<_> = by_replica(round)
                    .into_iter()
                    .map(|(replica, each)| {
                        scope.spawn(move || place(shared, replica, each, caches))
                    })
                    .collect();
                let joined = placing.into_iter().map(std::thread::ScopedJoinHandle::join);
                joined.collect::<Vec<_>>()
            });
            let mut failed = None;
            for made in made {
                let (done, error) = made.unwrap_or_else(|_| (Vec::new(), Some(stopped())));
                for it in done {
                    self.members[it.replica].homes[it.layer] = it.home;
                }
                failed = failed.or(error);
            }
            if let Some(error) = failed {
                return Err(error);
            }
        }
        Ok(())
    }

    fn resize(&mut self, shared: &dyn Members, replica: usize, sizes: PoolSizes) -> Result<()> {
        if self.members[replica].sizes == sizes {
            return Ok(());
        }
        // If it fails, one of the pools may have its new size: the next change has to set both.
        self.members[replica].sizes = PoolSizes::default();
        shared.engine(replica).resize(sizes)?;
        self.members[replica].sizes = sizes;
        Ok(())
    }
}

/// The moves of each replica.
fn by_replica(round: Vec<Move>) -> Vec<(usize, Vec<Move>)> {
    let mut each: Vec<(usize, Vec<Move>)> = Vec::new();
    for it in round {
        match each.iter_mut().find(|(replica, _)| *replica == it.replica) {
            Some((_, moves)) => moves.push(it),
            None => each.push((it.replica, vec![it])),
        }
    }
    each
}

/// Has an engine place layers; returns those that it placed, and the error that was in the way of the rest.
fn place(
    shared: &dyn Members,
    replica: usize,
    moves: Vec<Move>,
    caches: Caches,
) -> (Vec<Move>, Option<Arc<Error>>) {
    let mut done = Vec::new();
    for it in moves {
        let engine = shared.engine(replica);
        let placed = engine.place(it.layer, it.home.clone(), caches);
        match placed {
            Ok(()) => done.push(it),
            Err(error) => return (done, Some(error)),
        }
    }
    (done, None)
}
