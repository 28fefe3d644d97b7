//! The receiving engine's side of a fetched transfer.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::peer::Peer;
use super::receiving::Event;
use crate::cache::LayerRecord;
use crate::error::TransferError;
use crate::transfer::frame::Fetch;

/// A transfer from a producer. Dropping it before [`Incoming::hand_off`] cancels it on both sides.
pub struct Incoming {
    peer: Arc<Peer>,
    number: u32,
    events: UnboundedReceiver<Event>,
    /// Number of records taken.
    taken: u64,
    /// The number of records and the hand-off, once that has come.
    last: Option<(u64, Bytes)>,
    /// Why no more records come.
    failed: Option<TransferError>,
    /// The reason that the producer receives when this is dropped.
    reason: String,
}

impl Incoming {
    /// Requests a transfer from a peer; `None` if the peer has been given up.
    pub(super) fn begin(peer: &Arc<Peer>, fetch: Fetch) -> Option<Self> {
        let (sender, events) = unbounded_channel();
        let number = peer.begin(fetch, sender)?;
        Some(Self {
            peer: Arc::clone(peer),
            number,
            events,
            taken: 0,
            last: None,
            failed: None,
            reason: "the consumer needs it no more".to_owned(),
        })
    }

    /// Waits until the producer has accepted the transfer.
    pub(super) async fn accepted(&mut self) -> Result<(), TransferError> {
        // It is the first event, unless the transfer fails.
        self.event().await.map(|_| ())
    }

    fn fail(&mut self, error: TransferError) -> TransferError {
        self.failed = Some(error.clone());
        error
    }

    async fn event(&mut self) -> Result<Event, TransferError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        match self.events.recv().await {
            Some(Event::Failed(error)) => Err(self.fail(error)),
            Some(event) => Ok(event),
            None => Err(self.fail(TransferError::Closed)),
        }
    }

    /// The next record, in any order; `None` after the last. Taking a record lets the producer send another: while none is
    /// taken, the sending engine waits, and other transfers continue. Dropping the future loses no record.
    ///
    /// # Errors
    /// A transfer that the producer cancelled, or whose peer was lost. The records before are of no use then.
    pub async fn next(&mut self) -> Result<Option<LayerRecord>, TransferError> {
        loop {
            if self
                .last
                .as_ref()
                .is_some_and(|(all, _)| *all == self.taken)
            {
                return Ok(None);
            }
            match self.event().await? {
                Event::Accepted => {}
                Event::Record(sequence, record) => {
                    self.taken += 1;
                    self.peer.taken(self.number, sequence);
                    return Ok(Some(record));
                }
                Event::HandOff(records, bytes) => self.last = Some((records, bytes)),
                Event::Failed(error) => return Err(self.fail(error)),
            }
        }
    }

    /// Waits for the hand-off, which the producer's engine sends when it has sampled the first tokens. Records that were not
    /// taken are dropped. Afterwards the transfer does not depend on the producer any more.
    ///
    /// # Errors
    /// Those of [`Incoming::next`].
    pub async fn hand_off(mut self) -> Result<Vec<u8>, TransferError> {
        while self.next().await?.is_some() {}
        let bytes = self.last.take().map(|(_, bytes)| bytes);
        self.peer.complete(self.number);
        Ok(bytes.map(Vec::from).unwrap_or_default())
    }

    /// Cancels the transfer, with a reason for the producer.
    pub fn cancel(mut self, reason: &str) {
        reason.clone_into(&mut self.reason);
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.peer
            .cancel(self.number, std::mem::take(&mut self.reason));
    }
}
