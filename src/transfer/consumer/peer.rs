//! A pool of connections to one producer, and the transfers over them.
//!
//! When a connection is lost, the consumer repeats what it may have carried: what the consumer waits for, and how recent
//! transfers ended. A record is acknowledged over the connection that it came by, so that a lost acknowledgement is a lost
//! connection, after which the producer sends the record again and it is acknowledged again.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::mpsc::{self, UnboundedSender};
use tokio::time::{Instant, sleep};

use super::receiving::{Arrival, Event, Receiving};
use crate::cache::LayerRecord;
use crate::error::{Refusal, TransferError};
use crate::transfer::connection::{self, NoItems, Outbox};
use crate::transfer::frame::{Fetch, Frame};
use crate::transfer::framed::Received;
use crate::transfer::handshake::{Link, Local, connect, random, unexpected};
use crate::transfer::locked;
use crate::transfer::stats::Ended;

/// Pauses between two attempts to connect.
const PAUSES: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(2)];
/// Number of consecutive connections that may end with an invalid frame before the producer is given up.
const MAX_BROKEN: u32 = 16;
/// Number of ended transfers whose end is repeated after a lost connection.
const REMEMBERED: usize = 256;

#[derive(Default)]
struct State {
    connections: HashMap<u64, Outbox>,
    /// Number of connections opened so far, which numbers them.
    connected: u64,
    transfers: HashMap<u32, Receiving>,
    /// The number of the last transfer.
    last: u32,
    /// How recent transfers ended.
    ended: VecDeque<(u32, Frame)>,
    /// Number of connections that ended with an invalid frame since the engine last took a record.
    broken: u32,
    /// Why the peer has been given up.
    over: Option<TransferError>,
}

impl State {
    /// Sends a frame over a connection, or over any other if that one is closed.
    fn send(&self, connection: Option<u64>, transfer: u32, frame: Frame) {
        let own = connection.and_then(|connection| self.connections.get(&connection));
        if let Some(outbox) = own.or_else(|| self.connections.values().next()) {
            // A connection that is just ending accepts no frame, and counts as lost.
            let _ = outbox.send((transfer, frame));
        }
    }

    /// Repeats, over any connection, what a lost one may have carried.
    fn repeat(&self) {
        for (number, transfer) in &self.transfers {
            self.send(None, *number, Frame::Fetch(transfer.fetch.clone()));
        }
        for (number, frame) in &self.ended {
            self.send(None, *number, frame.clone());
        }
    }

    fn end(&mut self, connection: Option<u64>, number: u32, frame: Frame) {
        self.send(connection, number, frame.clone());
        if self.ended.len() >= REMEMBERED {
            self.ended.pop_front();
        }
        self.ended.push_back((number, frame));
    }
}

/// The work of a peer.
#[derive(Default)]
pub(super) struct Load {
    pub(super) waiting: u64,
    pub(super) active: u64,
    pub(super) held: u64,
}

/// A producer.
pub(super) struct Peer {
    address: String,
    /// The number that identifies the connections of one pool.
    pool: u128,
    local: Arc<Local>,
    state: Mutex<State>,
}

impl Peer {
    /// Starts to connect.
    pub(super) fn open(address: String, local: Arc<Local>) -> Result<Arc<Self>, TransferError> {
        let peer = Arc::new(Self {
            address,
            pool: u128::from_le_bytes(random()?),
            local,
            state: Mutex::default(),
        });
        tokio::spawn(first(Arc::clone(&peer)));
        Ok(peer)
    }

    pub(super) fn is_over(&self) -> bool {
        locked(&self.state).over.is_some()
    }

    pub(super) fn load(&self) -> Load {
        let state = locked(&self.state);
        state
            .transfers
            .values()
            .fold(Load::default(), |load, it| Load {
                waiting: load.waiting + u64::from(!it.fetch.accepted),
                active: load.active + u64::from(it.fetch.accepted),
                held: load.held + it.held as u64,
            })
    }

    /// Requests a transfer; returns its number, or `None` if the peer has been given up.
    pub(super) fn begin(&self, fetch: Fetch, events: UnboundedSender<Event>) -> Option<u32> {
        let mut state = locked(&self.state);
        if state.over.is_some() {
            return None;
        }
        // Number 0 is the connection itself.
        state.last = state.last.checked_add(1)?;
        let number = state.last;
        state.send(None, number, Frame::Fetch(fetch.clone()));
        let receiving = Receiving::new(fetch, events);
        state.transfers.insert(number, receiving);
        Some(number)
    }

    /// Acknowledges a record that the engine has taken.
    pub(super) fn taken(&self, number: u32, sequence: u64) {
        self.local.counters.records.fetch_add(1, Relaxed);
        let mut state = locked(&self.state);
        state.broken = 0;
        let transfer = state.transfers.get_mut(&number);
        if let Some(connection) = transfer.and_then(|it| it.take(sequence))
            && let Some(outbox) = state.connections.get(&connection)
        {
            // No other connection can be used: see the head of this file.
            let _ = outbox.send((number, Frame::Ack { sequence }));
        }
    }

    /// Completes a transfer that the engine has received.
    pub(super) fn complete(&self, number: u32) {
        let mut state = locked(&self.state);
        if let Some(transfer) = state.transfers.remove(&number) {
            state.end(transfer.hand_off, number, Frame::Complete);
            self.local.counters.ended(Ended::Completed);
        }
    }

    /// Cancels a transfer that the engine does not want any more.
    pub(super) fn cancel(&self, number: u32, reason: String) {
        let mut state = locked(&self.state);
        if state.transfers.remove(&number).is_some() {
            state.end(None, number, Frame::Cancel { reason });
            self.local.counters.ended(Ended::Cancelled);
        }
    }

    /// Ends all transfers and connections.
    pub(super) fn fail(&self, error: &TransferError) {
        let mut state = locked(&self.state);
        state.over.get_or_insert_with(|| error.clone());
        let numbers: Vec<u32> = state.transfers.keys().copied().collect();
        for number in numbers {
            self.fail_one(&mut state, number, error.clone());
        }
        state.connections.clear();
    }

    fn fail_one(&self, state: &mut State, number: u32, error: TransferError) {
        if let Some(transfer) = state.transfers.remove(&number) {
            let how = match error {
                TransferError::Cancelled { .. } => Ended::Cancelled,
                _ => Ended::Failed,
            };
            self.local.counters.ended(how);
            // Fails if the fetch was dropped.
            let _ = transfer.events.send(Event::Failed(error));
        }
    }

    /// Runs a connection until it ends; returns whether to reconnect.
    async fn run(self: &Arc<Self>, link: Link) -> bool {
        let (outbox, queued) = mpsc::unbounded_channel();
        let Some(connection) = self.attach(outbox) else {
            return false;
        };
        let end = connection::run(
            link,
            queued,
            NoItems,
            self.local.options.heartbeat,
            Arc::clone(&self.local.counters),
            |received| self.take(connection, received),
        )
        .await;
        if let Some(error) = end {
            self.local.counters.lost.fetch_add(1, Relaxed);
            tracing::info!("a transfer connection to {} ended: {error}", self.address);
            self.count_broken(&error);
        }
        self.detach(connection)
    }

    /// Gives up a producer that repeatedly sends invalid frames.
    fn count_broken(&self, error: &TransferError) {
        let network = matches!(
            error,
            TransferError::Io { .. } | TransferError::Timeout { .. }
        );
        if network || error.refusal() != Refusal::Protocol {
            return;
        }
        let broken = {
            let mut state = locked(&self.state);
            state.broken += 1;
            state.broken
        };
        if broken > MAX_BROKEN {
            self.fail(error);
        }
    }

    fn attach(&self, outbox: Outbox) -> Option<u64> {
        let mut state = locked(&self.state);
        if state.over.is_some() {
            return None;
        }
        let first = state.connections.is_empty();
        state.connected += 1;
        let connection = state.connected;
        state.connections.insert(connection, outbox);
        if first {
            state.repeat();
        }
        Some(connection)
    }

    /// Removes a connection; returns whether to reconnect.
    fn detach(self: &Arc<Self>, connection: u64) -> bool {
        let mut state = locked(&self.state);
        state.connections.remove(&connection);
        if state.over.is_some() {
            return false;
        }
        if !state.connections.is_empty() {
            state.repeat();
            return true;
        }
        if state.transfers.is_empty() {
            // The next fetch connects again.
            state.over = Some(TransferError::Closed);
            return false;
        }
        let (peer, connected) = (Arc::clone(self), state.connected);
        tokio::spawn(async move {
            let limit = peer.local.options.resume_timeout;
            sleep(limit).await;
            let lost = {
                let state = locked(&peer.state);
                state.connections.is_empty() && state.connected == connected
            };
            if lost {
                peer.fail(&TransferError::Lost {
                    peer: peer.address.clone(),
                    limit,
                });
            }
        });
        true
    }

    /// Takes a frame of the producer.
    fn take(&self, connection: u64, received: Received) -> Result<(), TransferError> {
        let number = received.transfer;
        match received.frame {
            Frame::Accepted => {
                let mut state = locked(&self.state);
                if let Some(transfer) = state.transfers.get_mut(&number) {
                    transfer.accept();
                }
            }
            Frame::Record { sequence, record } => {
                let record = Arc::unwrap_or_clone(record);
                let hash = received.hash.unwrap_or_else(|| record.hash());
                return self.take_record(connection, number, sequence, (record, hash));
            }
            Frame::HandOff { records, bytes } => {
                let mut state = locked(&self.state);
                let Some(transfer) = state.transfers.get_mut(&number) else {
                    over(&state, connection, number);
                    return Ok(());
                };
                transfer.accept();
                if transfer.hand_off.replace(connection).is_none() {
                    let _ = transfer.events.send(Event::HandOff(records, bytes));
                }
            }
            Frame::Refused { refusal, sentence } => {
                let mut state = locked(&self.state);
                let error = TransferError::Refused { refusal, sentence };
                self.fail_one(&mut state, number, error);
            }
            Frame::Cancel { reason } => {
                let mut state = locked(&self.state);
                self.fail_one(&mut state, number, TransferError::Cancelled { reason });
            }
            other => return Err(unexpected("what a producer sends", &other)),
        }
        Ok(())
    }

    fn take_record(
        &self,
        connection: u64,
        number: u32,
        sequence: u64,
        (record, hash): (LayerRecord, u64),
    ) -> Result<(), TransferError> {
        let mut state = locked(&self.state);
        let Some(transfer) = state.transfers.get_mut(&number) else {
            over(&state, connection, number);
            return Ok(());
        };
        if let Err(error) = record.check_hash(transfer.fetch.caches, hash) {
            let error = TransferError::Record(Arc::new(error));
            if transfer.damage() {
                self.fail_one(&mut state, number, error.clone());
                let reason = error.to_string();
                state.end(None, number, Frame::Cancel { reason });
            }
            return Err(error);
        }
        transfer.accept();
        match transfer.arrive(sequence, connection, record.bytes.len())? {
            Arrival::New => {
                let _ = transfer.events.send(Event::Record(sequence, record));
            }
            Arrival::Taken => state.send(Some(connection), number, Frame::Ack { sequence }),
            Arrival::Waiting => {}
        }
        Ok(())
    }
}

/// A frame came for a transfer that has ended here: the producer is told again how it ended.
fn over(state: &State, connection: u64, number: u32) {
    let ended = state.ended.iter().find(|(other, _)| *other == number);
    let frame = ended.map(|(_, frame)| frame.clone());
    let reason = || "the consumer knows of no such transfer".to_owned();
    let frame = frame.unwrap_or_else(|| Frame::Cancel { reason: reason() });
    state.send(Some(connection), number, frame);
}

/// Opens the first connection, and the others when it is established.
async fn first(peer: Arc<Peer>) {
    let limit = peer.local.options.handshake_timeout;
    let (start, mut pause) = (Instant::now(), PAUSES[0]);
    let link = loop {
        let error = match connect(&peer.address, peer.pool, &peer.local).await {
            Ok(link) => break link,
            Err(error) => error,
        };
        // A busy producer may soon have capacity; one that does not listen, or refuses permanently, is not retried.
        let waits = matches!(
            error,
            TransferError::Io { .. } | TransferError::Refused { .. }
        );
        if !waits || error.is_lasting() || start.elapsed() + pause > limit {
            peer.fail(&error);
            return;
        }
        sleep(pause).await;
        pause = (pause * 2).min(PAUSES[1]);
    };
    for _ in 1..peer.local.options.connections {
        tokio::spawn(keep(Arc::clone(&peer), None));
    }
    keep(peer, Some(link)).await;
}

/// Maintains one connection of the pool: reconnects when it is lost, as long as the pool is needed.
async fn keep(peer: Arc<Peer>, mut link: Option<Link>) {
    let mut pause = PAUSES[0];
    loop {
        if let Some(link) = link.take() {
            if !peer.run(link).await {
                return;
            }
            pause = PAUSES[0];
            sleep(pause).await;
        }
        if peer.is_over() {
            return;
        }
        match connect(&peer.address, peer.pool, &peer.local).await {
            Ok(opened) => link = Some(opened),
            Err(error) if error.is_lasting() => {
                peer.fail(&error);
                return;
            }
            Err(error) => {
                tracing::debug!("connecting to {}: {error}", peer.address);
                sleep(pause).await;
                pause = (pause * 2).min(PAUSES[1]);
            }
        }
    }
}
