//! The side that prefills and sends its caches (vLLM's `kv_producer`).

mod accept;
mod offer;
mod outgoing;
mod rendezvous;
mod sending;
mod session;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::net::{TcpListener, ToSocketAddrs};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use self::accept::Handshakes;
use self::offer::Ending;
pub use self::offer::{Offer, TransferOutcome};
pub use self::outgoing::{HandOffFuture, Outgoing, RecordSource};
use self::rendezvous::{Asked, Asking, Offered, Rendezvous};
use self::sending::Transfer;
use self::session::Session;
use super::connection::Outbox;
use super::frame::{Frame, MAX_ID};
use super::handshake::{Local, unexpected};
use super::identity::Identity;
use super::locked;
use super::options::TransferOptions;
use super::stats::{Counters, TransferStats};
use crate::error::{Refusal, TransferError};

/// Time that a shutdown waits for pending writes.
const SHUTDOWN: Duration = Duration::from_secs(5);

/// What consumers are told of a shutdown.
const SHUT_DOWN: &str = "the producer was shut down";

/// Accepts consumers' connections and sends them offered transfers. Dropping it ends everything; [`Producer::shutdown`] also
/// waits until consumers have been notified.
pub struct Producer {
    shared: Arc<Shared>,
    address: SocketAddr,
}

struct Shared {
    local: Local,
    counters: Arc<Counters>,
    rendezvous: Rendezvous,
    sessions: Mutex<HashMap<u128, Arc<Session>>>,
    handshakes: Handshakes,
    /// Connections after their handshake.
    capacity: Arc<Semaphore>,
    closing: watch::Sender<bool>,
    /// Connections and transfers.
    tasks: Mutex<JoinSet<()>>,
    runtime: Handle,
}

impl Producer {
    /// Listens for consumers of caches with the same identity.
    ///
    /// # Errors
    /// An address that cannot be bound, or TLS without a certificate.
    pub async fn listen(
        address: impl ToSocketAddrs + std::fmt::Debug,
        identity: Identity,
        options: TransferOptions,
    ) -> Result<Self, TransferError> {
        if let Some(tls) = &options.tls {
            tls.acceptor()?;
        }
        let failed = |source| TransferError::Listen {
            address: format!("{address:?}"),
            source: Arc::new(source),
        };
        let listener = TcpListener::bind(&address).await.map_err(failed)?;
        let own = listener.local_addr().map_err(failed)?;
        let counters = Arc::new(Counters::default());
        let shared = Arc::new(Shared {
            handshakes: Handshakes::new(options.max_handshakes),
            capacity: Arc::new(Semaphore::new(options.max_connections)),
            local: Local {
                identity,
                options,
                counters: Arc::clone(&counters),
            },
            counters,
            rendezvous: Rendezvous::default(),
            sessions: Mutex::default(),
            closing: watch::Sender::new(false),
            tasks: Mutex::default(),
            runtime: Handle::current(),
        });
        let accept = accept::run(listener, Arc::clone(&shared));
        shared.spawn(accept);
        Ok(Self {
            shared,
            address: own,
        })
    }

    /// The address that it listens on.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Offers a transfer under a name that its consumer knows; the consumer may have requested it before. Can be called from
    /// any thread.
    ///
    /// # Errors
    /// A name that is in use, empty or too long, or a producer that is shut down. The source is dropped then.
    pub fn offer(&self, id: String, outgoing: Outgoing) -> Result<Offer, TransferError> {
        if id.is_empty() || id.len() > MAX_ID {
            return Err(TransferError::IdLength {
                limit: MAX_ID,
                found: id.len(),
            });
        }
        let shared = &self.shared;
        if *shared.closing.borrow() {
            return Err(TransferError::Closed);
        }
        let ending = Ending::new(Arc::clone(&shared.counters));
        let offered = Offered::new(&shared.runtime, outgoing, Arc::clone(&ending));
        let waiter = offered.hand_off.waiter();
        match shared.rendezvous.offer(&id, offered)? {
            Some((asked, offered)) => shared.start(None, asked, offered),
            None => {
                let held = hold(Arc::clone(shared), id.clone(), Arc::clone(&ending), waiter);
                shared.spawn(held);
            }
        }
        Ok(Offer::new(id, ending))
    }

    /// Counters since it was created.
    #[must_use]
    pub fn stats(&self) -> TransferStats {
        let counts = self.shared.counters.snapshot();
        let sessions = locked(&self.shared.sessions);
        let loads = sessions.values().map(|session| session.load());
        let (active, held) = loads.fold((0, 0), |sum, load| (sum.0 + load.0, sum.1 + load.1));
        TransferStats {
            records_sent: self.shared.counters.records(),
            held_bytes: held as u64,
            waiting: self.shared.rendezvous.waiting(None) as u64,
            active: active as u64,
            ..counts
        }
    }

    /// Ends all transfers, notifies their consumers, and closes the port.
    pub async fn shutdown(&self) {
        self.shared.close();
        let mut tasks = std::mem::take(&mut *locked(&self.shared.tasks));
        let all = async { while tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(SHUTDOWN, all).await.is_err() {
            tracing::debug!("consumers did not close their connections within {SHUTDOWN:?}");
        }
    }
}

impl Drop for Producer {
    fn drop(&mut self) {
        self.shared.close();
    }
}

/// Keeps an offer until it is fetched, ended, or expired after completion.
async fn hold(
    shared: Arc<Shared>,
    id: String,
    ending: Arc<Ending>,
    waiter: watch::Receiver<Option<Result<bytes::Bytes, String>>>,
) {
    let unfetched = async {
        if let Err(reason) = sending::came(waiter).await {
            // The consumer may ask later, and is told then.
            ending.set(TransferOutcome::Failed { reason });
        }
        tokio::time::sleep(shared.local.options.hold_timeout).await;
    };
    let mut closing = shared.closing.subscribe();
    let cancelled = async {
        let outcome = ending.wait().await;
        if matches!(outcome, TransferOutcome::Failed { .. }) {
            let _ = closing.wait_for(|closing| *closing).await;
        }
    };
    tokio::select! {
        () = unfetched => {}
        () = cancelled => {}
    }
    if shared.rendezvous.withdraw(&id, &ending) {
        ending.set(TransferOutcome::Expired);
    }
}

impl Shared {
    /// Runs a task of this producer, which a shutdown waits for.
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = locked(&self.tasks);
        while tasks.try_join_next().is_some() {}
        tasks.spawn_on(task, &self.runtime);
    }

    /// Adds a connection to its consumer's session, which is created with the first one.
    fn attach(&self, pool: u128, connection: u64, outbox: Outbox) -> Arc<Session> {
        let mut sessions = locked(&self.sessions);
        let made = || Arc::new(Session::new(pool, Arc::clone(&self.counters)));
        let session = Arc::clone(sessions.entry(pool).or_insert_with(made));
        // Under the lock, so that the session is not removed as one without connections.
        session.attach(connection, outbox);
        session
    }

    /// Handles a frame from a consumer.
    fn take(
        self: &Arc<Self>,
        session: &Arc<Session>,
        connection: u64,
        number: u32,
        frame: Frame,
    ) -> Result<(), TransferError> {
        match frame {
            Frame::Fetch(fetch) => {
                let session = Arc::clone(session);
                let asked = Asked {
                    session,
                    number,
                    fetch,
                };
                self.ask(connection, asked);
            }
            Frame::Ack { sequence } => session.acknowledge(number, sequence),
            Frame::Complete => session.end(number, TransferOutcome::Completed),
            Frame::Cancel { reason } => {
                self.rendezvous.leave_all(session, Some(number));
                session.end(number, TransferOutcome::Cancelled { reason });
            }
            other => return Err(unexpected("what a consumer sends", &other)),
        }
        Ok(())
    }

    fn ask(self: &Arc<Self>, connection: u64, asked: Asked) {
        let (session, number) = (Arc::clone(&asked.session), asked.number);
        let id = asked.fetch.id.clone();
        if session.has(number) {
            session.send(Some(connection), number, Frame::Accepted);
            return;
        }
        if asked.fetch.accepted {
            let sentence = format!("transfer {id:?} is gone: it ended on this side");
            asked.refuse(Some(connection), Refusal::Unknown, sentence);
            return;
        }
        let limit = self.local.options.max_transfers;
        if session.load().0 + self.rendezvous.waiting(Some(&session)) >= limit {
            let sentence = format!("this consumer has {limit} transfers already");
            asked.refuse(Some(connection), Refusal::Busy, sentence);
            return;
        }
        match self.rendezvous.ask(connection, asked) {
            Asking::Starts(asked, offered) => self.start(Some(connection), asked, offered),
            Asking::Waits => self.wait_for_offer(id, session, number),
            Asking::WaitsAlready | Asking::Refused => {}
        }
    }

    /// Lets a consumer wait for an offer, for `hold_timeout` at most.
    fn wait_for_offer(self: &Arc<Self>, id: String, session: Arc<Session>, number: u32) {
        let shared = Arc::clone(self);
        let limit = self.local.options.hold_timeout;
        let mut closing = self.closing.subscribe();
        self.spawn(async move {
            tokio::select! {
                () = tokio::time::sleep(limit) => {
                    if let Some(asked) = shared.rendezvous.leave(&id, &session, number) {
                        let sentence = format!("no transfer {id:?} was offered within {limit:?}");
                        asked.refuse(None, Refusal::Unknown, sentence);
                    }
                }
                // A shutdown refuses all that wait.
                _ = closing.wait_for(|closing| *closing) => {}
            }
        });
    }

    /// Starts a transfer that is offered and fetched.
    fn start(self: &Arc<Self>, connection: Option<u64>, asked: Asked, offered: Offered) {
        let Asked {
            session,
            number,
            fetch,
        } = asked;
        let ending = Arc::clone(&offered.ending);
        let space = session.begin(number, Arc::clone(&ending));
        session.send(connection, number, Frame::Accepted);
        let window = usize::try_from(fetch.window).unwrap_or(usize::MAX);
        let transfer = Transfer {
            session: Arc::clone(&session),
            number,
            window: window.clamp(1, self.local.options.window_bytes.max(1)),
            have: usize::try_from(fetch.have.min(fetch.tokens)).unwrap_or(usize::MAX),
            records: offered.records,
            hand_off: offered.hand_off,
            ending,
            counters: Arc::clone(&self.counters),
        };
        let shared = Arc::clone(self);
        self.spawn(async move {
            let outcome = transfer.run(space).await;
            shared.rendezvous.done(&fetch.id);
            if outcome != TransferOutcome::Completed {
                let reason = outcome.reason().to_owned();
                session.send(None, number, Frame::Cancel { reason });
            }
            session.forget(number);
            // The last transfer of a session has notified its consumer, like all before it.
            if *shared.closing.borrow() && session.load().0 == 0 {
                session.disconnect();
            }
        });
    }

    /// A connection was lost: waits for another, if transfers depend on it.
    fn detach(self: &Arc<Self>, session: &Arc<Session>, connection: u64) {
        let Some(epoch) = session.detach(connection) else {
            return;
        };
        let idle = |session: &Arc<Session>| {
            session.load().0 == 0 && self.rendezvous.waiting(Some(session)) == 0
        };
        if idle(session) {
            self.remove(session);
            return;
        }
        let (shared, session) = (Arc::clone(self), Arc::clone(session));
        let limit = self.local.options.resume_timeout;
        let mut closing = self.closing.subscribe();
        self.spawn(async move {
            let reason = tokio::select! {
                () = tokio::time::sleep(limit) => {
                    format!("its consumer was not connected for {limit:?}")
                }
                _ = closing.wait_for(|closing| *closing) => SHUT_DOWN.to_owned(),
            };
            if session.is_lost_since(epoch) {
                shared.rendezvous.leave_all(&session, None);
                session.end_all(&TransferOutcome::Failed { reason });
                shared.remove(&session);
            }
        });
    }

    /// Removes a session, unless it has connections again.
    fn remove(&self, session: &Arc<Session>) {
        let mut sessions = locked(&self.sessions);
        if !session.is_connected() {
            sessions.remove(&session.pool);
        }
    }

    /// Ends everything: tasks notice it and return.
    fn close(&self) {
        self.closing.send_replace(true);
        let outcome = TransferOutcome::Failed {
            reason: SHUT_DOWN.to_owned(),
        };
        self.rendezvous.close(&outcome);
        let sessions: Vec<_> = locked(&self.sessions).drain().collect();
        for (_, session) in sessions {
            session.end_all(&outcome);
            if session.load().0 == 0 {
                session.disconnect();
            }
        }
    }
}
