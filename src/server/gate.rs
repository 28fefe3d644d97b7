//! Counts the requests that are being answered, and closes behind the last: a shutdown finishes or refuses, it never cuts.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::watch;

use super::error::{ApiError, Result};

/// Where requests come in.
#[derive(Debug)]
pub(super) struct Gate {
    inside: watch::Sender<usize>,
    closed: AtomicBool,
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
            closed: AtomicBool::new(false),
        })
    }

    /// Lets a request in, unless it is closed.
    pub(super) fn enter(self: &Arc<Self>) -> Result<Inside> {
        // Counted first: whoever closes it and then waits sees everyone who was let in.
        self.inside.send_modify(|inside| *inside += 1);
        let inside = Inside(Arc::clone(self));
        if self.is_closed() {
            return Err(ApiError::unavailable("the server is shutting down"));
        }
        Ok(inside)
    }

    /// How many are inside.
    pub(super) fn count(&self) -> usize {
        *self.inside.borrow()
    }

    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Waits until nobody is inside.
    pub(super) async fn empty(&self) {
        // It ends with an error only if the sender is gone, and that is here.
        let _ = self
            .inside
            .subscribe()
            .wait_for(|inside| *inside == 0)
            .await;
    }
}
