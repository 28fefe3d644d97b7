//! Accepting connections: limits, handshakes, and the frames of a consumer's connection.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout_at};

use super::Shared;
use super::session::SessionItems;
use crate::error::{Refusal, TransferError};
use crate::transfer::connection;
use crate::transfer::handshake::{Taken, take};
use crate::transfer::locked;

/// Time to wait when the system accepts no connection, for example because all file descriptors are in use.
const PAUSE: Duration = Duration::from_millis(50);

/// Connections in their handshake, oldest first. Beyond the limit a new one replaces the oldest, so that idle peers do not
/// keep others out.
pub(super) struct Handshakes {
    limit: usize,
    next: AtomicU64,
    all: Mutex<VecDeque<(u64, oneshot::Sender<()>)>>,
}

impl Handshakes {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            limit: limit.max(1),
            next: AtomicU64::new(0),
            all: Mutex::default(),
        }
    }

    /// Adds a connection: its number, and a signal that another replaces it.
    fn enter(&self) -> (u64, oneshot::Receiver<()>) {
        let number = self.next.fetch_add(1, Relaxed);
        let (sender, replaced) = oneshot::channel();
        let mut all = locked(&self.all);
        if all.len() >= self.limit {
            all.pop_front();
        }
        all.push_back((number, sender));
        (number, replaced)
    }

    fn leave(&self, number: u64) {
        locked(&self.all).retain(|(other, _)| *other != number);
    }
}

/// Accepts connections until the producer is closed.
pub(super) async fn run(listener: TcpListener, shared: Arc<Shared>) {
    let mut closing = shared.closing.subscribe();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = closing.wait_for(|closing| *closing) => return,
        };
        match accepted {
            Ok((socket, peer)) => {
                let (number, replaced) = shared.handshakes.enter();
                let task = serve(Arc::clone(&shared), socket, peer, number, replaced);
                shared.spawn(task);
            }
            Err(error) => {
                tracing::warn!("a transfer connection could not be taken: {error}");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

fn busy(what: &str) -> TransferError {
    TransferError::Refused {
        refusal: Refusal::Busy,
        sentence: format!("there are too many connections {what}; try again later"),
    }
}

/// Does a connection's handshake and runs it.
async fn serve(
    shared: Arc<Shared>,
    socket: TcpStream,
    peer: SocketAddr,
    number: u64,
    mut replaced: oneshot::Receiver<()>,
) {
    let done = handshake(&shared, socket, peer, &mut replaced).await;
    shared.handshakes.leave(number);
    if let Some((taken, pool)) = done {
        run_connection(&shared, taken, pool, peer, number).await;
    }
}

/// Performs the handshake; a refused peer is told why, and closed.
async fn handshake(
    shared: &Shared,
    socket: TcpStream,
    peer: SocketAddr,
    replaced: &mut oneshot::Receiver<()>,
) -> Option<(Taken, u128)> {
    let limit = shared.local.options.handshake_timeout;
    let end = Instant::now() + limit;
    let what = "the handshake";
    let late = |_| TransferError::Timeout { what, limit };
    let refuse = |error: &TransferError| {
        shared.counters.refused.fetch_add(1, Relaxed);
        tracing::warn!("a transfer connection of {peer} was refused: {error}");
    };
    // Without TLS the connection is ready at once. Taking it comes first, since a peer is told of its refusal only then.
    let begun = tokio::select! {
        biased;
        begun = timeout_at(end, take(socket, &shared.local)) => begun.map_err(late).flatten(),
        _ = &mut *replaced => Err(busy("in their handshake")),
    };
    let mut taken = match begun {
        Ok(taken) => taken,
        Err(error) => {
            refuse(&error);
            return None;
        }
    };
    let authentic = tokio::select! {
        authentic = timeout_at(end, taken.authenticate(&shared.local)) => {
            authentic.map_err(late).flatten()
        }
        _ = &mut *replaced => {
            let error = busy("in their handshake");
            refuse(&error);
            taken.refuse(&error, false).await;
            return None;
        }
    };
    match authentic {
        Ok(pool) => Some((taken, pool)),
        Err(error) => {
            refuse(&error);
            // A connection that waits for its refusal to be read is replaced like the others.
            tokio::select! {
                biased;
                () = taken.refuse(&error, true) => {}
                _ = &mut *replaced => {}
            }
            None
        }
    }
}

/// Runs a consumer's connection to its end.
async fn run_connection(
    shared: &Arc<Shared>,
    taken: Taken,
    pool: u128,
    peer: SocketAddr,
    number: u64,
) {
    let Ok(_permit) = Arc::clone(&shared.capacity).try_acquire_owned() else {
        let limit = shared.local.options.max_connections;
        shared.counters.refused.fetch_add(1, Relaxed);
        let error = busy(&format!("(the limit is {limit})"));
        taken.refuse(&error, true).await;
        return;
    };
    let (outbox, queued) = mpsc::unbounded_channel();
    let session = shared.attach(pool, number, outbox);
    if *shared.closing.borrow() {
        session.disconnect();
    }
    let items = SessionItems {
        session: Arc::clone(&session),
        connection: number,
    };
    let end = connection::run(
        taken.link(),
        queued,
        items,
        shared.local.options.heartbeat,
        Arc::clone(&shared.counters),
        |received| shared.take(&session, number, received.transfer, received.frame),
    )
    .await;
    if let Some(error) = end {
        shared.counters.lost.fetch_add(1, Relaxed);
        tracing::info!("a transfer connection of {peer} ended: {error}");
    }
    shared.detach(&session, number);
}
