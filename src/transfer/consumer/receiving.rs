//! A consumer's state of one transfer: which records have come, and which of them its engine has not taken yet.

use std::collections::{BTreeSet, HashMap};

use bytes::Bytes;
use tokio::sync::mpsc::UnboundedSender;

use crate::cache::LayerRecord;
use crate::error::TransferError;
use crate::transfer::frame::Fetch;

/// Maximum distance of a record's number from the first missing one.
const MAX_AHEAD: u64 = 1 << 20;
/// Number of times that a record may come damaged before the transfer fails: the producer's memory may be faulty.
const MAX_DAMAGED: u32 = 3;

/// An event of a transfer.
pub(super) enum Event {
    /// The producer accepted it.
    Accepted,
    /// A record and its number.
    Record(u64, LayerRecord),
    /// The hand-off, and the number of records.
    HandOff(u64, Bytes),
    /// The end; no more events follow.
    Failed(TransferError),
}

/// What to do with a record that came.
#[derive(Debug, PartialEq)]
pub(super) enum Arrival {
    /// Pass it to the engine.
    New,
    /// The engine has it: acknowledge it again.
    Taken,
    /// It is already queued for the engine.
    Waiting,
}

/// One transfer.
pub(super) struct Receiving {
    pub(super) fetch: Fetch,
    pub(super) events: UnboundedSender<Event>,
    /// All records below this number have come.
    low: u64,
    /// Records above it that have come.
    ahead: BTreeSet<u64>,
    /// Records queued for the engine: the connection that they last came by, and their bytes.
    waiting: HashMap<u64, (u64, usize)>,
    pub(super) held: usize,
    /// The connection that the hand-off last came by.
    pub(super) hand_off: Option<u64>,
    damaged: u32,
}

impl Receiving {
    pub(super) fn new(fetch: Fetch, events: UnboundedSender<Event>) -> Self {
        Self {
            fetch,
            events,
            low: 0,
            ahead: BTreeSet::new(),
            waiting: HashMap::new(),
            held: 0,
            hand_off: None,
            damaged: 0,
        }
    }

    /// The producer accepted the transfer: it says so, or a record comes first over a faster connection.
    pub(super) fn accept(&mut self) {
        if !std::mem::replace(&mut self.fetch.accepted, true) {
            // Fails if the fetch was dropped.
            let _ = self.events.send(Event::Accepted);
        }
    }

    /// Registers a record of `bytes` bytes.
    ///
    /// # Errors
    /// A number that is too far ahead, or more bytes in flight than the window allows.
    pub(super) fn arrive(
        &mut self,
        sequence: u64,
        connection: u64,
        bytes: usize,
    ) -> Result<Arrival, TransferError> {
        if let Some((carrier, _)) = self.waiting.get_mut(&sequence) {
            *carrier = connection;
            return Ok(Arrival::Waiting);
        }
        if sequence < self.low || self.ahead.contains(&sequence) {
            return Ok(Arrival::Taken);
        }
        if sequence - self.low > MAX_AHEAD {
            let expected = format!("at most {}", self.low + MAX_AHEAD);
            return Err(TransferError::frame("sequence", expected, sequence));
        }
        let held = (self.held + bytes) as u64;
        if self.held > 0 && held > self.fetch.window {
            let expected = format!("within the window of {} bytes", self.fetch.window);
            let found = format!("{bytes} more than {} that wait", self.held);
            return Err(TransferError::frame("body", expected, found));
        }
        self.ahead.insert(sequence);
        while self.ahead.remove(&self.low) {
            self.low += 1;
        }
        self.waiting.insert(sequence, (connection, bytes));
        self.held += bytes;
        Ok(Arrival::New)
    }

    /// The engine takes a record; returns the connection that it came by.
    pub(super) fn take(&mut self, sequence: u64) -> Option<u64> {
        let (connection, bytes) = self.waiting.remove(&sequence)?;
        self.held -= bytes;
        Some(connection)
    }

    /// Counts a damaged record; returns whether there were too many.
    pub(super) fn damage(&mut self) -> bool {
        self.damaged += 1;
        self.damaged > MAX_DAMAGED
    }
}
