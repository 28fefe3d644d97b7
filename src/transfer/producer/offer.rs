//! How an offered transfer ends, and waiting for that.

use std::sync::Arc;

use tokio::sync::watch;

use crate::transfer::stats::{Counters, Ended};

/// The result of a transfer on the producer's side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TransferOutcome {
    /// The consumer has received everything.
    Completed,
    /// One of the sides cancelled it.
    Cancelled {
        /// Why.
        reason: String,
    },
    /// No consumer fetched it in time.
    Expired,
    /// The request or its consumer was lost.
    Failed {
        /// Why.
        reason: String,
    },
}

impl TransferOutcome {
    /// The reason for the consumer why the transfer no longer exists.
    pub(super) fn reason(&self) -> &str {
        match self {
            Self::Completed => "everything was acknowledged",
            Self::Cancelled { reason } | Self::Failed { reason } => reason,
            Self::Expired => "it was not fetched in time",
        }
    }
}

/// The result of one transfer: the first that is set is kept.
pub(super) struct Ending {
    outcome: watch::Sender<Option<TransferOutcome>>,
    counters: Arc<Counters>,
}

impl Ending {
    pub(super) fn new(counters: Arc<Counters>) -> Arc<Self> {
        Arc::new(Self {
            outcome: watch::Sender::new(None),
            counters,
        })
    }

    pub(super) fn set(&self, outcome: TransferOutcome) {
        self.outcome.send_if_modified(|set| {
            if set.is_some() {
                return false;
            }
            self.counters.ended(match outcome {
                TransferOutcome::Completed => Ended::Completed,
                TransferOutcome::Cancelled { .. } => Ended::Cancelled,
                TransferOutcome::Expired => Ended::Expired,
                TransferOutcome::Failed { .. } => Ended::Failed,
            });
            *set = Some(outcome);
            true
        });
    }

    pub(super) fn get(&self) -> Option<TransferOutcome> {
        self.outcome.borrow().clone()
    }

    /// Waits for the end.
    pub(super) async fn wait(&self) -> TransferOutcome {
        let mut receiver = self.outcome.subscribe();
        loop {
            if let Some(outcome) = self.get() {
                return outcome;
            }
            // Never an error: the sender is in `self`.
            let _ = receiver.changed().await;
        }
    }
}

/// An offered transfer. Dropping this has no effect: the transfer is kept until it is fetched or expires.
#[must_use]
#[derive(Clone)]
pub struct Offer {
    id: String,
    ending: Arc<Ending>,
}

impl Offer {
    pub(super) fn new(id: String, ending: Arc<Ending>) -> Self {
        Self { id, ending }
    }

    /// The transfer's name.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Waits for the result.
    pub async fn finished(&self) -> TransferOutcome {
        self.ending.wait().await
    }

    /// Cancels the transfer, whether it has been fetched or not: the consumer receives the reason, and the source is dropped.
    pub fn cancel(&self, reason: &str) {
        let reason = reason.to_owned();
        self.ending.set(TransferOutcome::Cancelled { reason });
    }
}
