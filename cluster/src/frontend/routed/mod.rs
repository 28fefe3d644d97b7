//! An engine client over Dynamo's routed engine: token ids go out, token ids come back.
//!
//! A request for several answers is as many requests of one answer to Dynamo, so that each can migrate to another worker; the client sees
//! one request. `admit.rs` takes what comes, `send.rs` sends one answer, `answer.rs` turns its chunks into events and has it go on
//! elsewhere when its worker is lost, `shared.rs` passes the events of all to the client.
//!
//! Dynamo's own migration is not used: it sends the answer on under the same id, and its router of prefills refuses that for as long as
//! the lost attempt's prefill is under way.

mod admit;
mod answer;
mod error;
mod send;
mod shared;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use dynamo_llm::entrypoint::PrefillRoutedEngine;
use kimi_linear::engine::{EngineClient, Request, RequestId, Sink, Status};
use kimi_linear::error::EngineError;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::totals::Totals;
use shared::Shared;

/// Where a request goes.
#[derive(Clone)]
pub struct Routed {
    /// Dynamo's pipeline to the workers.
    pub engine: PrefillRoutedEngine,
    /// The model's name, as the workers registered it.
    pub model: String,
    /// The workers that it may be sent to; `None` for all.
    pub allowed: Option<HashSet<u64>>,
    /// Whether these workers prefill and decode their own requests.
    pub aggregated: bool,
}

/// Knows the workers.
pub trait Route: Send + Sync + 'static {
    /// The pipeline for the next request.
    ///
    /// # Errors
    /// [`EngineError::Unavailable`], with the roles that are missing.
    fn route(&self) -> Result<Routed, EngineError>;

    /// The sum of what the workers tell.
    fn status(&self) -> Status;

    /// Has all workers remove their cached prefixes. It blocks until they have.
    ///
    /// # Errors
    /// [`EngineError::Unavailable`], with the workers that did not.
    fn clear_cache(&self) -> Result<(), EngineError>;
}

/// Times that the client limits.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How long a worker may take until its response stream is there. A prompt that waits in its queue is behind that.
    pub dispatch: Duration,
    /// How long a request that no worker can take is tried again.
    pub retry: Duration,
    /// How often an answer may go on at another worker, after the loss of its own.
    pub migrations: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            dispatch: Duration::from_secs(120),
            retry: Duration::from_secs(3),
            migrations: 3,
        }
    }
}

/// What all requests share.
struct Client {
    route: Arc<dyn Route>,
    limits: Limits,
    totals: Arc<Totals>,
    /// Cancels each request that has not ended.
    active: Mutex<HashMap<RequestId, CancellationToken>>,
}

impl Client {
    fn active(&self) -> std::sync::MutexGuard<'_, HashMap<RequestId, CancellationToken>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The engine client.
pub struct RoutedEngine {
    client: Arc<Client>,
    runtime: Handle,
    next: AtomicU64,
}

impl RoutedEngine {
    /// A client whose requests run on `runtime`.
    #[must_use]
    pub fn new(
        route: Arc<dyn Route>,
        limits: Limits,
        totals: Arc<Totals>,
        runtime: Handle,
    ) -> Self {
        Self {
            client: Arc::new(Client {
                route,
                limits,
                totals,
                active: Mutex::default(),
            }),
            runtime,
            next: AtomicU64::new(1),
        }
    }
}

impl EngineClient for RoutedEngine {
    fn submit_all(&self, requests: Vec<(Request, Sink)>) -> Vec<RequestId> {
        let submitted: Vec<_> = requests
            .into_iter()
            .map(|(request, sink)| {
                let id = RequestId(self.next.fetch_add(1, Ordering::Relaxed));
                let cancel = CancellationToken::new();
                self.client.active().insert(id, cancel.clone());
                self.client.totals.taken();
                let shared =
                    Shared::new(id, request.samples, sink, cancel, Arc::clone(&self.client));
                (request, shared)
            })
            .collect();
        let ids = submitted.iter().map(|(_, shared)| shared.id()).collect();
        let client = Arc::clone(&self.client);
        self.runtime.spawn(admit::run(client, submitted));
        ids
    }

    fn cancel(&self, id: RequestId) {
        // The request's tasks take it out of the table.
        if let Some(cancel) = self.client.active().get(&id) {
            cancel.cancel();
        }
    }

    fn is_running(&self) -> bool {
        self.client.route.route().is_ok()
    }

    fn status(&self) -> Result<Status, EngineError> {
        // Without workers the reason is more use than zeros.
        self.client.route.route()?;
        Ok(self.client.route.status())
    }

    fn clear_cache(&self) -> Result<(), EngineError> {
        self.client.route.clear_cache()
    }
}

#[cfg(test)]
mod tests;
