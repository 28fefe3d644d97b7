//! The client of several engines: each request goes to the least loaded one.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::answering::Answering;
use super::controller::Control;
use super::groups::Groups;
use super::load::Loads;
use super::members::{Member, Members};
use super::state::Parameters;
use crate::cache::Occupancy;
use crate::engine::{
    Demand, EngineClient, EngineHandle, Event, Request, RequestId, Sink, Speculated, Status,
};
use crate::error::{EngineError, Error};

/// The engines of all replicas, as one.
///
/// Requests go to the replica with the fewest waiting answers, then the fewest running ones, then in turn; a request for several
/// answers goes to one whole. If a replica's device fails, or its engine ends, its answers go on at others with the tokens they
/// have; nobody's answer changes.
pub struct DataParallel {
    shared: Arc<Shared>,
    control: Option<Control>,
}

/// How long it is waited for the end of an engine.
const MOST_TIME: Duration = Duration::from_secs(10);

/// What all requests share.
pub(super) struct Shared {
    engines: Vec<Replica>,
    loads: Mutex<Loads>,
    /// Requests that have not ended.
    active: Mutex<HashMap<RequestId, Arc<Answering>>>,
    /// Maximum tokens of a prompt and its answer together.
    context: usize,
    next: AtomicU64,
    migrated: AtomicU64,
}

struct Replica {
    engine: EngineHandle,
    /// Whether its device may have failed since its last token.
    doubted: AtomicBool,
}

impl DataParallel {
    /// The client of these engines, which have no other client. At most `most` answers run and wait at each of them; their own
    /// queues must not be limited, since answers of a lost replica have to find room. `context` is the maximum number of tokens
    /// of a prompt and its answer together.
    #[must_use]
    pub fn new(engines: Vec<EngineHandle>, most: usize, context: usize) -> Self {
        let loads = Loads::new(engines.len(), most);
        let replica = |engine| Replica {
            engine,
            doubted: AtomicBool::new(false),
        };
        let shared = Shared {
            engines: engines.into_iter().map(replica).collect(),
            loads: Mutex::new(loads),
            active: Mutex::default(),
            context,
            next: AtomicU64::new(1),
            migrated: AtomicU64::new(0),
        };
        Self {
            shared: Arc::new(shared),
            control: None,
        }
    }

    /// Number of replicas, including those that have ended.
    #[must_use]
    pub fn replicas(&self) -> usize {
        self.shared.engines.len()
    }

    /// The engine of a replica, for monitoring.
    #[must_use]
    pub fn engine(&self, replica: usize) -> &EngineHandle {
        self.shared.engine(replica)
    }

    /// Ends a replica, as if its device had failed: it gets no requests any more, and those that it has go on at others.
    ///
    /// # Errors
    /// A replica of its group that cannot hold all parameters again yet, and will try again.
    pub fn end(&self, replica: usize) -> Result<(), Arc<Error>> {
        match &self.control {
            Some(control) => control.lose(replica),
            None => {
                self.shared.end(replica);
                Ok(())
            }
        }
    }

    /// Number of answers that have gone on at another replica so far.
    #[must_use]
    pub fn migrated(&self) -> u64 {
        self.shared.migrated_answers()
    }

    /// Has parameters dropped and restored.
    pub(super) fn controlled(
        mut self,
        groups: Groups,
        automatic: bool,
    ) -> Result<Self, EngineError> {
        let members = Arc::clone(&self.shared) as Arc<dyn Members>;
        let local = (0..self.replicas()).collect();
        let control = Control::start(groups, &members, local, automatic)?;
        self.control = Some(control);
        Ok(self)
    }

    /// Has all replicas drop duplicated parameters as one group, whatever the demand. It waits until they have.
    ///
    /// # Errors
    /// Replicas that drop nothing, or a change that has failed and will be taken back.
    pub fn drop_parameters(&self) -> Result<(), Arc<Error>> {
        self.control()?.drop_parameters()
    }

    /// Has each replica hold all parameters again, whatever the demand. It waits until they do.
    ///
    /// # Errors
    /// Replicas that drop nothing, or a change that has failed and will be tried again.
    pub fn restore_parameters(&self) -> Result<(), Arc<Error>> {
        self.control()?.restore_parameters()
    }

    fn control(&self) -> Result<&Control, Arc<Error>> {
        self.control.as_ref().ok_or_else(|| {
            let reason = "the replicas were loaded to keep them".to_owned();
            Arc::new(EngineError::ParameterDrop { reason }.into())
        })
    }

    /// The replica for each of these requests, where their answers are counted from now on.
    fn place(&self, requests: &[(Request, Sink)]) -> Result<Vec<usize>, EngineError> {
        let (mut loads, now) = (self.shared.loads(), Instant::now());
        let mut placed = Vec::with_capacity(requests.len());
        for (request, _) in requests {
            if let Some(replica) = loads.take(request.samples, now) {
                placed.push(replica);
                continue;
            }
            for (replica, (request, _)) in placed.iter().zip(requests) {
                loads.left(*replica, request.samples, false);
            }
            let answers = requests.iter().map(|(request, _)| request.samples).sum();
            let most = loads.most();
            return Err(match loads.any() {
                false => EngineError::Stopped,
                true if answers > most => EngineError::BatchTooLarge { answers, most },
                true => EngineError::QueueFull {
                    waiting: loads.waiting(),
                },
            });
        }
        Ok(placed)
    }
}

impl Shared {
    pub(super) fn engine(&self, replica: usize) -> &EngineHandle {
        &self.engines[replica].engine
    }

    pub(super) fn loads(&self) -> MutexGuard<'_, Loads> {
        self.loads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn active(&self) -> MutexGuard<'_, HashMap<RequestId, Arc<Answering>>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An id that no request and no part of one has had.
    pub(super) fn next_id(&self) -> RequestId {
        RequestId(self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// A request has had its last event.
    pub(super) fn ended(&self, id: RequestId) {
        let ended = self.active().remove(&id);
        drop(ended);
    }

    /// So many answers go on at another replica.
    pub(super) fn migrated(&self, answers: u64) {
        self.migrated.fetch_add(answers, Ordering::Relaxed);
    }

    /// Number of answers that have gone on at another replica so far.
    pub(super) fn migrated_answers(&self) -> u64 {
        self.migrated.load(Ordering::Relaxed)
    }

    /// A replica's device has failed.
    pub(super) fn failed(&self, replica: usize) {
        self.engines[replica].doubted.store(true, Ordering::Relaxed);
        self.loads().failed(replica, Instant::now());
    }

    /// A replica has computed a token.
    pub(super) fn is_well(&self, replica: usize) {
        let doubted = &self.engines[replica].doubted;
        // Every token comes here.
        if doubted.load(Ordering::Relaxed) && doubted.swap(false, Ordering::Relaxed) {
            self.loads().is_well(replica);
        }
    }

    /// Ends a replica, whose requests go on at others.
    pub(super) fn end(&self, replica: usize) {
        if !self.loads().end(replica) {
            return;
        }
        let lost = Arc::new(Error::from(EngineError::Unavailable {
            reason: format!("replica {replica} has ended"),
        }));
        let active: Vec<_> = self.active().values().cloned().collect();
        for answering in active {
            answering.leave(replica, &lost);
        }
        self.engine(replica).stop(MOST_TIME);
    }

    /// The replicas that have not ended.
    fn left(&self) -> Vec<&EngineHandle> {
        let loads = self.loads();
        let each = self.engines.iter().enumerate();
        let left = each.filter(|(replica, _)| !loads.has_ended(*replica));
        left.map(|(_, replica)| &replica.engine).collect()
    }
}

impl Members for Shared {
    fn engine(&self, replica: usize) -> &dyn Member {
        Shared::engine(self, replica)
    }

    fn end(&self, replica: usize) {
        Shared::end(self, replica);
    }

    fn migrated(&self) -> u64 {
        self.migrated_answers()
    }
}

impl EngineClient for DataParallel {
    fn submit_all(&self, requests: Vec<(Request, Sink)>) -> Vec<RequestId> {
        let shared = &self.shared;
        let ids: Vec<_> = requests.iter().map(|_| shared.next_id()).collect();
        let placed = match self.place(&requests) {
            Ok(placed) => placed,
            Err(error) => {
                let error = Arc::new(Error::from(error));
                for (_, mut sink) in requests {
                    let _ = sink(Event::Failed(Arc::clone(&error)));
                }
                return ids;
            }
        };
        let each = requests.into_iter().zip(ids.iter().zip(placed));
        let answering = each.map(|((mut request, sink), (id, replica))| {
            // The pools of a replica may hold longer sequences now than later.
            let most = (shared.context + 1).saturating_sub(request.prompt.len());
            request.max_tokens = request.max_tokens.min(most);
            let answering = Answering::new(*id, request, sink, replica, shared);
            shared.active().insert(*id, Arc::clone(&answering));
            answering
        });
        let answering: Vec<_> = answering.collect();
        for one in answering {
            one.start();
        }
        ids
    }

    fn cancel(&self, id: RequestId) {
        let answering = self.shared.active().get(&id).cloned();
        if let Some(answering) = answering {
            answering.cancel();
        }
    }

    fn is_running(&self) -> bool {
        self.shared.left().into_iter().any(EngineHandle::is_running)
    }

    fn status(&self) -> Result<Status, EngineError> {
        let each = self.shared.left().into_iter().map(EngineHandle::status);
        let each = each.filter_map(Result::ok);
        each.reduce(plus).ok_or(EngineError::Stopped)
    }

    fn parameters(&self) -> Option<Parameters> {
        self.control.as_ref().map(Control::parameters)
    }

    fn clear_cache(&self) -> Result<(), EngineError> {
        let left = self.shared.left();
        let cleared = left.iter().map(|engine| engine.clear_cache());
        // One that has stopped has no cache.
        cleared.fold(Err(EngineError::Stopped), Result::or)
    }
}

/// The numbers of two engines together.
fn plus(a: Status, b: Status) -> Status {
    let (pools, more) = (a.occupancy, b.occupancy);
    Status {
        running: a.running + b.running,
        waiting: a.waiting + b.waiting,
        preemptions: a.preemptions + b.preemptions,
        speculated: Speculated {
            drafts: a.speculated.drafts + b.speculated.drafts,
            draft_tokens: a.speculated.draft_tokens + b.speculated.draft_tokens,
            accepted_tokens: a.speculated.accepted_tokens + b.speculated.accepted_tokens,
        },
        occupancy: Occupancy {
            slots: pools.slots + more.slots,
            all_slots: pools.all_slots + more.all_slots,
            blocks: pools.blocks + more.blocks,
            all_blocks: pools.all_blocks + more.all_blocks,
            idle_slots: pools.idle_slots + more.idle_slots,
            idle_blocks: pools.idle_blocks + more.idle_blocks,
            device_checkpoints: pools.device_checkpoints + more.device_checkpoints,
            host_checkpoints: pools.host_checkpoints + more.host_checkpoints,
            host_bytes: pools.host_bytes + more.host_bytes,
            evictions: pools.evictions + more.evictions,
        },
        demand: Demand {
            held_slots: a.demand.held_slots + b.demand.held_slots,
            held_blocks: a.demand.held_blocks + b.demand.held_blocks,
            queued_slots: a.demand.queued_slots + b.demand.queued_slots,
            queued_blocks: a.demand.queued_blocks + b.demand.queued_blocks,
            all_slots: a.demand.all_slots + b.demand.all_slots,
            all_blocks: a.demand.all_blocks + b.demand.all_blocks,
            ..a.demand
        },
        suspended: a.suspended && b.suspended,
    }
}
