//! The sending side for one consumer: its connections, and the records that any of them may send.
//!
//! A record is in its transfer's queue, or in flight on the connection that sent it, until the consumer acknowledges it.
//! Records in flight on a connection that was lost return to the front of the queue.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Bound;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};

use tokio::sync::Notify;

use super::offer::{Ending, TransferOutcome};
use crate::transfer::connection::{Items, Outbox};
use crate::transfer::frame::Frame;
use crate::transfer::locked;
use crate::transfer::stats::Counters;

/// The number of a hand-off among a transfer's records.
pub(super) const HAND_OFF: u64 = u64::MAX;

/// An accepted transfer.
pub(super) struct Sending {
    ending: Arc<Ending>,
    /// Bytes of `queue` and `flight`.
    held: usize,
    queue: VecDeque<(u64, Frame)>,
    /// By number: the frame, and the connection that it was sent over.
    flight: HashMap<u64, (Frame, u64)>,
    /// Notified when `held` decreases.
    space: Arc<Notify>,
}

#[derive(Default)]
struct State {
    connections: HashMap<u64, Outbox>,
    transfers: BTreeMap<u32, Sending>,
    /// The transfer that sent last: the next one is served next.
    last: u32,
    /// Incremented by each connection, so that a timer can tell whether one came meanwhile.
    epoch: u64,
}

/// A consumer.
pub(super) struct Session {
    /// The number of its pool of connections.
    pub(super) pool: u128,
    counters: Arc<Counters>,
    state: Mutex<State>,
    /// Notified when a queue is not empty.
    ready: Notify,
}

impl Session {
    pub(super) fn new(pool: u128, counters: Arc<Counters>) -> Self {
        Self {
            pool,
            counters,
            state: Mutex::default(),
            ready: Notify::new(),
        }
    }

    /// Adds a connection.
    pub(super) fn attach(&self, connection: u64, outbox: Outbox) {
        let mut state = locked(&self.state);
        state.connections.insert(connection, outbox);
        state.epoch += 1;
        drop(state);
        self.ready.notify_one();
    }

    /// Removes a connection: what it had in flight is sent again. Returns the epoch, if it was the last one.
    pub(super) fn detach(&self, connection: u64) -> Option<u64> {
        let mut state = locked(&self.state);
        state.connections.remove(&connection);
        let mut resent = 0;
        for transfer in state.transfers.values_mut() {
            let lost = transfer.flight.iter();
            let lost = lost.filter(|(_, (_, carrier))| *carrier == connection);
            let mut lost: Vec<u64> = lost.map(|(sequence, _)| *sequence).collect();
            lost.sort_unstable();
            resent += lost.len() as u64;
            for sequence in lost.into_iter().rev() {
                if let Some((frame, _)) = transfer.flight.remove(&sequence) {
                    transfer.queue.push_front((sequence, frame));
                }
            }
        }
        let last = state.connections.is_empty().then_some(state.epoch);
        drop(state);
        self.counters.resent.fetch_add(resent, Relaxed);
        self.ready.notify_one();
        last
    }

    /// Whether no connection was added since this epoch.
    pub(super) fn is_lost_since(&self, epoch: u64) -> bool {
        let state = locked(&self.state);
        state.connections.is_empty() && state.epoch == epoch
    }

    pub(super) fn is_connected(&self) -> bool {
        !locked(&self.state).connections.is_empty()
    }

    /// Sends a frame over a connection, or over any other if that one is closed. If the frame is lost, the consumer requests
    /// again.
    pub(super) fn send(&self, connection: Option<u64>, transfer: u32, frame: Frame) {
        let state = locked(&self.state);
        let own = connection.and_then(|connection| state.connections.get(&connection));
        if let Some(outbox) = own.or_else(|| state.connections.values().next()) {
            // A connection that is just ending accepts no frame, and counts as lost.
            let _ = outbox.send((transfer, frame));
        }
    }

    /// Ends all connections once everything sent to them is written.
    pub(super) fn disconnect(&self) {
        locked(&self.state).connections.clear();
    }

    pub(super) fn has(&self, number: u32) -> bool {
        locked(&self.state).transfers.contains_key(&number)
    }

    /// Number of transfers, and the bytes that they hold.
    pub(super) fn load(&self) -> (usize, usize) {
        let state = locked(&self.state);
        let held = state.transfers.values().map(|transfer| transfer.held);
        (state.transfers.len(), held.sum())
    }

    /// Starts a transfer; returns a signal for free space in its window.
    pub(super) fn begin(&self, number: u32, ending: Arc<Ending>) -> Arc<Notify> {
        let space = Arc::new(Notify::new());
        let sending = Sending {
            ending,
            held: 0,
            queue: VecDeque::new(),
            flight: HashMap::new(),
            space: Arc::clone(&space),
        };
        locked(&self.state).transfers.insert(number, sending);
        space
    }

    /// Removes a transfer and what it holds.
    pub(super) fn forget(&self, number: u32) {
        locked(&self.state).transfers.remove(&number);
    }

    /// Bytes that a transfer holds.
    pub(super) fn held(&self, number: u32) -> usize {
        let state = locked(&self.state);
        state.transfers.get(&number).map_or(0, |it| it.held)
    }

    /// Adds a record or the hand-off to a transfer's queue.
    pub(super) fn push(&self, number: u32, sequence: u64, frame: Frame) {
        let mut state = locked(&self.state);
        if let Some(transfer) = state.transfers.get_mut(&number) {
            transfer.held += frame.body().len();
            transfer.queue.push_back((sequence, frame));
        }
        drop(state);
        self.ready.notify_one();
    }

    /// Handles the acknowledgement of a record.
    pub(super) fn acknowledge(&self, number: u32, sequence: u64) {
        let mut state = locked(&self.state);
        if let Some(transfer) = state.transfers.get_mut(&number)
            && let Some((frame, _)) = transfer.flight.remove(&sequence)
        {
            transfer.held -= frame.body().len();
            transfer.space.notify_one();
        }
    }

    /// Ends a transfer as the consumer requests.
    pub(super) fn end(&self, number: u32, outcome: TransferOutcome) {
        let ending = {
            let state = locked(&self.state);
            let transfer = state.transfers.get(&number);
            transfer.map(|transfer| Arc::clone(&transfer.ending))
        };
        if let Some(ending) = ending {
            ending.set(outcome);
        }
    }

    /// Ends all transfers.
    pub(super) fn end_all(&self, outcome: &TransferOutcome) {
        let endings: Vec<_> = {
            let state = locked(&self.state);
            let transfers = state.transfers.values();
            transfers.map(|it| Arc::clone(&it.ending)).collect()
        };
        for ending in endings {
            ending.set(outcome.clone());
        }
    }

    /// The next frame for a connection, round robin over the transfers.
    fn take(&self, connection: u64) -> Option<(u32, Frame)> {
        let mut state = locked(&self.state);
        let after = (Bound::Excluded(state.last), Bound::Unbounded);
        let waiting =
            |(number, transfer): (&u32, &Sending)| (!transfer.queue.is_empty()).then_some(*number);
        let mut rest = state.transfers.range(after);
        let next = rest.find_map(waiting);
        let number = next.or_else(|| state.transfers.range(..=state.last).find_map(waiting))?;
        state.last = number;
        let transfer = state.transfers.get_mut(&number)?;
        let (sequence, frame) = transfer.queue.pop_front()?;
        transfer
            .flight
            .insert(sequence, (frame.clone(), connection));
        let more = state.transfers.values().any(|it| !it.queue.is_empty());
        drop(state);
        if more {
            // Another connection may be waiting.
            self.ready.notify_one();
        }
        Some((number, frame))
    }
}

/// The source of a connection's frames in a session.
pub(super) struct SessionItems {
    pub(super) session: Arc<Session>,
    pub(super) connection: u64,
}

impl Items for SessionItems {
    async fn next(&self) -> (u32, Frame) {
        loop {
            if let Some(item) = self.session.take(self.connection) {
                return item;
            }
            self.session.ready.notified().await;
        }
    }
}
