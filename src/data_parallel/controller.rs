//! Decides when groups of replicas drop duplicated parameters and when they restore them, and has their engines do it.
//!
//! It is a thread that looks at all replicas ten times a second. When to drop, which groups merge, and when to restore are the policy of
//! [`kimi_linear_plan::burst`], whose simulation is in docs/performance/bursts.md. A change of a group is a list of moves of
//! layers ([`super::homes`]), each made by an engine between two of its steps: requests are answered all the time.

use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use kimi_linear_plan::burst::drop;
use kimi_linear_plan::burst::trigger::{Demand, Trigger, restores};

use super::groups::{Group, Groups};
use super::members::Members;
use super::state::{Parameters, ReplicaParameters};
use crate::backend::Replicas;
use crate::engine::{self, Status};
use crate::error::{EngineError, Error};

/// How often it looks.
const POLL: Duration = Duration::from_millis(100);

/// How many consecutive looks must find too much demand.
const AGREE: u32 = 2;

/// A group restores when its caches use less than this fraction of what there is without dropping.
const RESTORE_BELOW: f64 = 0.5;

/// How long it waits before it tries again what has failed.
const RETRY: Duration = Duration::from_secs(1);

/// What it is told to do.
enum Order {
    Drop(Sender<Result<(), Arc<Error>>>),
    Restore(Sender<Result<(), Arc<Error>>>),
    Lose(usize, Sender<Result<(), Arc<Error>>>),
}

/// A running controller. It ends when this is dropped.
pub(super) struct Control {
    orders: Sender<Order>,
    devices: Arc<Replicas>,
    /// The replicas of this process.
    local: Vec<usize>,
    parameters: Arc<Mutex<Parameters>>,
}

impl Control {
    /// Starts the thread. `local` are the replicas of this process; `automatic` says whether parameters are dropped and restored by demand.
    ///
    /// # Errors
    /// If no thread can be started.
    pub(super) fn start(
        groups: Groups,
        shared: &Arc<dyn Members>,
        local: Vec<usize>,
        automatic: bool,
    ) -> Result<Self, EngineError> {
        let (orders, received) = mpsc::channel();
        let devices = Arc::clone(groups.devices());
        let parameters = Arc::new(Mutex::new(groups.parameters(Instant::now())));
        let controller = Controller {
            groups,
            shared: Arc::downgrade(shared),
            automatic,
            trigger: Trigger::new(AGREE),
            paused: None,
            parameters: Arc::clone(&parameters),
        };
        std::thread::Builder::new()
            .name("parameters".to_owned())
            .spawn(move || controller.run(&received))
            .map_err(|error| EngineError::NoThread {
                reason: error.to_string(),
            })?;
        Ok(Self {
            orders,
            devices,
            local,
            parameters,
        })
    }

    /// Whether the device of a replica is there.
    #[cfg(feature = "transfer")]
    pub(super) fn has(&self, replica: usize) -> bool {
        !self.devices.lost(replica)
    }

    /// The parameters of this process' replicas as of the last look, and the memory of their devices now.
    pub(super) fn parameters(&self) -> Parameters {
        let parameters = self.parameters.lock();
        let mut parameters = parameters.unwrap_or_else(PoisonError::into_inner).clone();
        let all = std::mem::take(&mut parameters.replicas);
        let local = all.into_iter().enumerate();
        let local = local.filter(|(replica, _)| self.local.contains(replica));
        parameters.replicas = local
            .map(|(device, replica)| ReplicaParameters {
                memory: self.devices.memory(device),
                ..replica
            })
            .collect();
        parameters
    }

    /// Has all replicas drop what they can, as one group.
    pub(super) fn drop_parameters(&self) -> Result<(), Arc<Error>> {
        self.order(Order::Drop)
    }

    /// Has all groups restore.
    pub(super) fn restore_parameters(&self) -> Result<(), Arc<Error>> {
        self.order(Order::Restore)
    }

    /// Gives a replica and its device up.
    pub(super) fn lose(&self, replica: usize) -> Result<(), Arc<Error>> {
        self.order(|answer| Order::Lose(replica, answer))
    }

    fn order(
        &self,
        order: impl FnOnce(Sender<Result<(), Arc<Error>>>) -> Order,
    ) -> Result<(), Arc<Error>> {
        let stopped = || Arc::new(Error::from(EngineError::Stopped));
        let (answer, received) = mpsc::channel();
        let sent = self.orders.send(order(answer));
        sent.map_err(|_| stopped())?;
        received.recv().unwrap_or_else(|_| Err(stopped()))
    }
}

struct Controller {
    groups: Groups,
    shared: Weak<dyn Members>,
    automatic: bool,
    trigger: Trigger,
    /// Until when nothing is changed, after a change that has failed.
    paused: Option<Instant>,
    parameters: Arc<Mutex<Parameters>>,
}

impl Controller {
    fn run(mut self, orders: &Receiver<Order>) {
        loop {
            let order = match orders.recv_timeout(POLL) {
                Ok(order) => Some(order),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            // The engines are those of the client, which may end at any time.
            let Some(shared) = self.shared.upgrade() else {
                return;
            };
            let shared = &*shared;
            self.replace_lost(shared);
            self.take_in(shared);
            let answer = match order {
                Some(Order::Drop(answer)) => Some((answer, self.merge_all(shared))),
                Some(Order::Restore(answer)) => Some((answer, self.restore_all(shared))),
                Some(Order::Lose(replica, answer)) => {
                    let done = self.groups.lose(shared, replica);
                    Some((answer, self.noted(done)))
                }
                None => {
                    self.look(shared);
                    None
                }
            };
            self.publish(shared);
            if let Some((answer, done)) = answer {
                let _ = answer.send(done);
            }
        }
    }

    /// Tells everybody how it stands.
    fn publish(&self, shared: &dyn Members) {
        let mut now = self.groups.parameters(Instant::now());
        now.migrated = shared.migrated();
        *self
            .parameters
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = now;
    }

    /// Has the answers of lost replicas go on at others, and their groups without them.
    fn replace_lost(&mut self, shared: &dyn Members) {
        for replica in self.groups.gone(shared) {
            let done = self.groups.lose(shared, replica);
            let _ = self.noted(done);
        }
    }

    /// Uses a replica again that was lost.
    fn take_in(&mut self, shared: &dyn Members) {
        let lacked = |replica: &usize| self.groups.lacks(*replica);
        let Some(replica) = shared.returned().filter(lacked) else {
            return;
        };
        shared.begin(replica);
        match self.groups.devices().found(replica) {
            Ok(()) => self.groups.found(replica),
            Err(error) => {
                tracing::warn!("replica {replica} is not ready: {error}");
                shared.end(replica);
            }
        }
    }

    /// Pauses after a change that has failed.
    fn noted(&mut self, done: Result<(), Arc<Error>>) -> Result<(), Arc<Error>> {
        done.inspect_err(|error| {
            tracing::error!("a change of parameters has failed: {error}");
            self.paused = Some(Instant::now() + RETRY);
        })
    }

    fn merge_all(&mut self, shared: &dyn Members) -> Result<(), Arc<Error>> {
        let all: Vec<usize> = (0..self.groups.all().len()).collect();
        if let [_] = all[..]
            && self.groups.all()[0].is_dropped()
        {
            return Ok(());
        }
        let merged = self.groups.merge(shared, &all);
        self.noted(merged)
    }

    fn restore_all(&mut self, shared: &dyn Members) -> Result<(), Arc<Error>> {
        while let Some(index) = self.groups.all().iter().position(Group::is_dropped) {
            let restored = self.groups.restore(shared, index);
            self.noted(restored)?;
        }
        Ok(())
    }

    /// Acts by demand.
    fn look(&mut self, shared: &dyn Members) {
        let statuses = self.groups.statuses(shared);
        for replica in self.groups.resume(shared, &statuses) {
            let done = self.groups.lose(shared, replica);
            let _ = self.noted(done);
        }
        if self.paused.is_some_and(|until| Instant::now() < until) {
            return;
        }
        if let Some(index) = self.groups.unfinished() {
            let restored = self.groups.restore(shared, index);
            let _ = self.noted(restored);
        } else if self.automatic {
            self.change_by_demand(shared, &statuses);
        }
    }

    fn change_by_demand(&mut self, shared: &dyn Members, statuses: &[Option<Status>]) {
        let each = statuses.iter().flatten();
        let all = each.flat_map(demands);
        if let Some(missing) = self.trigger.look(all) {
            let groups = self.groups.all().iter();
            let sizes: Vec<u32> = groups.map(|it| it.members.len() as u32).collect();
            let (copy, most) = self.groups.copy_and_most();
            let plan = drop::plan(&sizes, copy, missing, most);
            let chosen = plan.merges.into_iter().map(|set| {
                let members = set.iter().map(|it| self.groups.all()[*it].members.clone());
                members.collect::<Vec<_>>()
            });
            let chosen: Vec<_> = chosen.collect();
            for set in chosen {
                // A merge changes the numbers of the groups after it.
                let groups = self.groups.all().iter().enumerate();
                let named = groups.filter(|(_, it)| set.contains(&it.members));
                let named: Vec<usize> = named.map(|(index, _)| index).collect();
                let merged = self.groups.merge(shared, &named);
                if self.noted(merged).is_err() {
                    return;
                }
            }
            return;
        }
        while let Some(index) = self.idle_group(statuses) {
            let restored = self.groups.restore(shared, index);
            if self.noted(restored).is_err() {
                return;
            }
        }
    }

    /// A group that uses so little of its caches that it can restore.
    fn idle_group(&self, statuses: &[Option<Status>]) -> Option<usize> {
        let whole = self.groups.whole_bytes();
        let calm = |member: &usize| {
            let Some(status) = &statuses[*member] else {
                return false;
            };
            let each = demands(status).into_iter().zip(whole);
            let mut each = each.map(|(demand, whole)| restores(&demand, whole, RESTORE_BELOW));
            each.all(|calm| calm)
        };
        let mut groups = self.groups.all().iter();
        groups.position(|group| group.is_dropped() && group.members.iter().all(calm))
    }
}

/// The demand of a replica for slots and for blocks, in bytes: free memory of one kind does not help the other.
fn demands(status: &Status) -> [Demand; 2] {
    let engine::Demand {
        held_slots,
        held_blocks,
        queued_slots,
        queued_blocks,
        all_slots,
        all_blocks,
        slot_bytes,
        block_bytes,
    } = status.demand;
    let demand = |bytes: u64, held: usize, queued: usize, all: usize| Demand {
        held: bytes * held as u64,
        queued: bytes * queued as u64,
        capacity: bytes * all as u64,
    };
    [
        demand(slot_bytes, held_slots, queued_slots, all_slots),
        demand(block_bytes, held_blocks, queued_blocks, all_blocks),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_may_be_missing_where_slots_are_not() {
        let status = Status {
            demand: engine::Demand {
                held_slots: 6,
                held_blocks: 90,
                queued_slots: 4,
                queued_blocks: 40,
                all_slots: 12,
                all_blocks: 100,
                slot_bytes: 1000,
                block_bytes: 10,
            },
            ..Status::default()
        };
        assert_eq!(demands(&status).map(|it| it.missing()), [0, 300]);
        let below = |part| demands(&status).map(|it| restores(&it, 12_000, part));
        assert_eq!(below(0.9), [false, false]);
    }
}
