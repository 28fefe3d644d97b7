//! One request: where its answers are computed, and how they go on elsewhere when a replica is lost.
//!
//! A request is sent to one replica whole. If that is lost, each of its unfinished answers becomes a request of its own, with the
//! tokens that were answered so far at the end of its prompt ([`Request::answered`]); random numbers, penalties and grammars
//! continue after them, so that the answers do not change. Its client sees one request.

use std::ops::{ControlFlow, Range};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use super::client::Shared;
use super::told::Told;
use crate::engine::{Event, FinishReason, Request, RequestId, Sink};
use crate::error::{EngineError, Error, Scope};

/// How often an answer may go on at another replica: one that fails every device ends there.
const MIGRATIONS: u32 = 3;

/// A request that has not ended.
pub(super) struct Answering {
    id: RequestId,
    state: Mutex<State>,
    shared: Weak<Shared>,
}

struct State {
    /// `None` once the last event was passed on, so that the client learns that no more will come.
    sink: Option<Sink>,
    told: Told,
    /// The answers that have not ended, by replica.
    parts: Vec<Part>,
    cancelled: bool,
}

/// Answers of a request that are computed together.
struct Part {
    /// Its id at its replica, which distinguishes it from those that were lost before.
    key: RequestId,
    replica: usize,
    samples: Range<usize>,
    /// Answers that have not ended.
    left: usize,
    /// Whether its prompt has begun.
    began: bool,
    migrations: u32,
}

/// A part that is to be sent to its replica.
struct Sending {
    key: RequestId,
    replica: usize,
    request: Request,
}

/// Takes the events of a part. If it is dropped before the last one, its replica is lost: an engine's thread that has panicked.
struct Events {
    answering: Arc<Answering>,
    key: RequestId,
}

impl Drop for Events {
    fn drop(&mut self) {
        let stopped = Arc::new(Error::from(EngineError::Stopped));
        self.answering.lost(self.key, &stopped);
    }
}

/// Whether another replica can do what this one could not.
fn is_loss(error: &Error) -> bool {
    match error {
        Error::Failed(error) => is_loss(error),
        Error::Engine(EngineError::Stopped) => true,
        error => error.scope() == Scope::Device,
    }
}

impl Answering {
    /// A request for a replica where its answers were counted.
    pub(super) fn new(
        id: RequestId,
        request: Request,
        sink: Sink,
        replica: usize,
        shared: &Arc<Shared>,
    ) -> Arc<Self> {
        let part = Part {
            key: shared.next_id(),
            replica,
            samples: 0..request.samples,
            left: request.samples,
            began: false,
            migrations: 0,
        };
        Arc::new(Self {
            id,
            state: Mutex::new(State {
                sink: Some(sink),
                told: Told::new(request),
                parts: vec![part],
                cancelled: false,
            }),
            shared: Arc::downgrade(shared),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends it to its replica.
    pub(super) fn start(self: &Arc<Self>) {
        let sending = {
            let state = self.state();
            let send = |part: &Part| Sending {
                key: part.key,
                replica: part.replica,
                request: state.told.request().clone(),
            };
            state.parts.iter().map(send).collect()
        };
        self.send(sending);
    }

    /// Cancels it; the last events come from its replicas.
    pub(super) fn cancel(&self) {
        let parts: Vec<_> = {
            let mut state = self.state();
            state.cancelled = true;
            let parts = state.parts.iter();
            parts.map(|part| (part.replica, part.key)).collect()
        };
        if let Some(shared) = self.shared.upgrade() {
            for (replica, key) in parts {
                shared.engine(replica).cancel(key);
            }
        }
    }

    /// What a replica computes of it goes on elsewhere.
    pub(super) fn leave(self: &Arc<Self>, replica: usize, error: &Arc<Error>) {
        let keys: Vec<_> = {
            let state = self.state();
            let there = state.parts.iter().filter(|part| part.replica == replica);
            there.map(|part| part.key).collect()
        };
        for key in keys {
            self.lost(key, error);
            if let Some(shared) = self.shared.upgrade() {
                shared.engine(replica).cancel(key);
            }
        }
    }

    /// Sends parts to their replicas. The lock must not be held: an engine that has stopped answers at once.
    fn send(self: &Arc<Self>, sending: Vec<Sending>) {
        let Some(shared) = self.shared.upgrade() else {
            return;
        };
        for Sending {
            key,
            replica,
            request,
        } in sending
        {
            let answering = Arc::clone(self);
            let events = Events { answering, key };
            let sink = Box::new(move |event| events.answering.take(events.key, event));
            let engine = shared.engine(replica);
            engine.submit_as(key, request, sink);
            // It may have been cancelled before it was there.
            if self.state().cancelled {
                engine.cancel(key);
            }
        }
    }

    /// Takes an event of a part.
    fn take(self: &Arc<Self>, key: RequestId, event: Event) -> ControlFlow<()> {
        if let Event::Failed(error) = &event
            && is_loss(error)
        {
            self.lost(key, error);
            return ControlFlow::Continue(());
        }
        let Some(shared) = self.shared.upgrade() else {
            return ControlFlow::Break(());
        };
        let mut state = self.state();
        let Some(index) = state.parts.iter().position(|part| part.key == key) else {
            // It goes on elsewhere.
            return ControlFlow::Break(());
        };
        let part = &mut state.parts[index];
        let first = part.samples.start;
        match &event {
            Event::Prefill { .. } if !part.began => {
                part.began = true;
                shared.loads().began(part.replica, part.left);
            }
            Event::Token { .. } => shared.is_well(part.replica),
            Event::Finished { .. } => {
                part.left -= 1;
                shared.loads().left(part.replica, 1, part.began);
                if part.left == 0 {
                    state.parts.remove(index);
                }
            }
            Event::Failed(_) => state.drop_parts(&shared, Some(key)),
            _ => {}
        }
        let flow = state.pass(counted_from(first, event));
        self.unlock(state, &shared);
        flow
    }

    /// Releases the state, and the request's memory if it has ended.
    fn unlock(&self, mut state: MutexGuard<'_, State>, shared: &Shared) {
        let over = state.parts.is_empty();
        let sink = state.sink.take_if(|_| over);
        drop(state);
        if over {
            shared.ended(self.id);
        }
        // It may hold anything, and is dropped without the lock.
        drop(sink);
    }

    /// What a part has not answered goes on at other replicas.
    fn lost(self: &Arc<Self>, key: RequestId, error: &Arc<Error>) {
        let Some(shared) = self.shared.upgrade() else {
            return;
        };
        let mut state = self.state();
        let Some(index) = state.parts.iter().position(|part| part.key == key) else {
            return;
        };
        let part = state.parts.remove(index);
        shared.loads().left(part.replica, part.left, part.began);
        shared.failed(part.replica);
        let mut sending = Vec::new();
        for sample in part.samples.clone() {
            if state.told.has_ended(sample) {
                continue;
            }
            let Some(request) = state.told.rest(sample) else {
                // Only the word that it is complete was lost.
                state.finish(sample, FinishReason::Length);
                continue;
            };
            if state.cancelled {
                state.finish(sample, FinishReason::Cancelled);
                continue;
            }
            let may = part.migrations < MIGRATIONS;
            let replica = may.then(|| shared.loads().take_begun(1, Instant::now()));
            let Some(replica) = replica.flatten() else {
                state.drop_parts(&shared, None);
                sending.clear();
                let _ = state.pass(Event::Failed(Arc::clone(error)));
                break;
            };
            let key = shared.next_id();
            state.parts.push(Part {
                key,
                replica,
                samples: sample..sample + 1,
                left: 1,
                began: false,
                migrations: part.migrations + 1,
            });
            sending.push(Sending {
                key,
                replica,
                request,
            });
        }
        self.unlock(state, &shared);
        if !sending.is_empty() {
            shared.migrated(sending.len() as u64);
            let from = part.replica;
            tracing::warn!("an answer of replica {from} goes on at another: {error}");
        }
        self.send(sending);
    }
}

/// The event with the answers of a part counted as those of the request.
fn counted_from(first: usize, mut event: Event) -> Event {
    if let Event::Token { sample, .. }
    | Event::Trace { sample, .. }
    | Event::Finished { sample, .. } = &mut event
    {
        *sample += first;
    }
    event
}

impl State {
    /// Passes an event to the client, if it is news. It breaks where the client wants no more of an answer.
    fn pass(&mut self, event: Event) -> ControlFlow<()> {
        match (&mut self.sink, self.told.news(event)) {
            (Some(sink), Some(event)) => sink(event),
            _ => ControlFlow::Continue(()),
        }
    }

    /// An answer has ended without its replica's word.
    fn finish(&mut self, sample: usize, reason: FinishReason) {
        let _ = self.pass(Event::Finished {
            sample,
            reason,
            stop_token: None,
            usage: self.told.usage(sample),
        });
    }

    /// The request has failed: nothing more of it is computed. The part `failed` knows it.
    fn drop_parts(&mut self, shared: &Shared, failed: Option<RequestId>) {
        for part in self.parts.drain(..) {
            shared.loads().left(part.replica, part.left, part.began);
            if failed != Some(part.key) {
                shared.engine(part.replica).cancel(part.key);
            }
        }
    }
}
