//! How an offered transfer ends, and waiting for it.

use std::sync::Arc;

use tokio::sync::watch;

use crate::transfer::stats::{Counters, Ended};

/// How a transfer ended, for the producer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TransferOutcome {
    /// The consumer has everything.
    Completed,
    /// One of the sides gave it up.
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
    /// Why there is no transfer any more, for the consumer.
    pub(super) fn reason(&self) -> &str {
        match self {
            Self::Completed => "everything was acknowledged",
            Self::Cancelled { reason } | Self::Failed { reason } => reason,
            Self::Expired => "it was not fetched in time",
        }
    }
}

/// The end of one transfer: the first that is set stays.
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

/// A transfer that is offered. Dropping it changes nothing: the transfer is kept until it is fetched or its time is over.
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

    /// Waits until it has ended.
    pub async fn finished(&self) -> TransferOutcome {
        self.ending.wait().await
    }

    /// Gives it up, whether it is fetched or not: the consumer is told the reason, and the source is dropped.
    pub fn cancel(&self, reason: &str) {
        let reason = reason.to_owned();
        self.ending.set(TransferOutcome::Cancelled { reason });
    }
}
