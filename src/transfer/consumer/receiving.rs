//! What a consumer knows of one transfer: which records have come, and which of them its engine has not taken yet.

use std::collections::{BTreeSet, HashMap};

use bytes::Bytes;
use tokio::sync::mpsc::UnboundedSender;

use crate::cache::LayerRecord;
use crate::error::TransferError;
use crate::transfer::frame::Fetch;

/// How far ahead of the first missing record another may be.
const MAX_AHEAD: u64 = 1 << 20;
/// How often a record may come damaged before the transfer fails: its producer's memory may be what damages it.
const MAX_DAMAGED: u32 = 3;

/// What has come of a transfer.
pub(super) enum Event {
    /// The producer sends it.
    Accepted,
    /// A record and its number.
    Record(u64, LayerRecord),
    /// The hand-off, and how many records there are.
    HandOff(u64, Bytes),
    /// Nothing more comes.
    Failed(TransferError),
}

/// What is to be done with a record that came.
#[derive(Debug, PartialEq)]
pub(super) enum Arrival {
    /// It goes to the engine.
    New,
    /// The engine has it: the producer is told again.
    Taken,
    /// It waits for the engine already.
    Waiting,
}

/// One transfer.
pub(super) struct Receiving {
    pub(super) fetch: Fetch,
    pub(super) events: UnboundedSender<Event>,
    /// All records below it have come.
    low: u64,
    /// Those above that have come.
    ahead: BTreeSet<u64>,
    /// Records that wait for the engine: the connection that they came by last, and their bytes.
    waiting: HashMap<u64, (u64, usize)>,
    pub(super) held: usize,
    /// The connection that the hand-off came by last.
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

    /// The producer sends it: it says so, or something of the transfer comes, over a connection that was faster.
    pub(super) fn accept(&mut self) {
        if !std::mem::replace(&mut self.fetch.accepted, true) {
            // Fails where the fetch was dropped.
            let _ = self.events.send(Event::Accepted);
        }
    }

    /// Notes a record of `bytes` bytes.
    ///
    /// # Errors
    /// A number that is too far ahead, or more bytes than the window lets be on their way.
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

    /// The engine takes a record: the connection that it came by.
    pub(super) fn take(&mut self, sequence: u64) -> Option<u64> {
        let (connection, bytes) = self.waiting.remove(&sequence)?;
        self.held -= bytes;
        Some(connection)
    }

    /// Notes a damaged record; whether there were too many.
    pub(super) fn damage(&mut self) -> bool {
        self.damaged += 1;
        self.damaged > MAX_DAMAGED
    }
}
