//! Counts the requests in progress. A shutdown closes the gate: later requests are refused, earlier ones are finished.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::watch;

use super::error::{ApiError, Result};

/// The gate that every request passes.
#[derive(Debug)]
pub(super) struct Gate {
    inside: watch::Sender<usize>,
    closed: watch::Sender<bool>,
    /// Whether connections end now, even with a request or an answer in progress.
    over: watch::Sender<bool>,
    /// Number of connections and requests so far.
    seen: AtomicU64,
}

/// A request that is being answered, until it is dropped.
#[derive(Debug)]
pub(super) struct Inside(Arc<Gate>);

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.inside.send_modify(|inside| *inside -= 1);
    }
}

impl Gate {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            inside: watch::Sender::new(0),
            closed: watch::Sender::new(false),
            over: watch::Sender::new(false),
            seen: AtomicU64::new(0),
        })
    }

    /// Admits a request, unless the gate is closed.
    pub(super) fn enter(self: &Arc<Self>) -> Result<Inside> {
        self.see();
        // Counted first, so that a thread that closes the gate and then waits sees every request that was admitted.
        self.inside.send_modify(|inside| *inside += 1);
        let inside = Inside(Arc::clone(self));
        if self.is_closed() {
            return Err(ApiError::unavailable("the server is shutting down"));
        }
        Ok(inside)
    }

    /// Counts a connection or a request.
    pub(super) fn see(&self) {
        self.seen.fetch_add(1, Ordering::Relaxed);
    }

    /// Number of connections and requests so far.
    pub(super) fn seen(&self) -> u64 {
        self.seen.load(Ordering::Relaxed)
    }

    /// Number of requests in progress.
    pub(super) fn count(&self) -> usize {
        *self.inside.borrow()
    }

    pub(super) fn close(&self) {
        self.closed.send_replace(true);
    }

    pub(super) fn is_closed(&self) -> bool {
        *self.closed.borrow()
    }

    /// Waits until it is closed.
    pub(super) async fn closing(&self) {
        let _ = self.closed.subscribe().wait_for(|closed| *closed).await;
    }

    /// Ends connections.
    pub(super) fn end(&self) {
        self.over.send_replace(true);
    }

    /// Waits until connections are to end.
    pub(super) async fn ending(&self) {
        let _ = self.over.subscribe().wait_for(|over| *over).await;
    }

    /// Waits until no request is in progress.
    pub(super) async fn empty(&self) {
        // It ends with an error only if the sender is gone, and that is here.
        let _ = self
            .inside
            .subscribe()
            .wait_for(|inside| *inside == 0)
            .await;
    }
}
