//! Messages between the processes of one model: the connections, handshakes and heartbeats of transfers, and numbered calls
//! with answers over them.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::task::{Context, Poll};

use bytes::Bytes;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::connection::{self, NoItems};
use super::frame::Frame;
use super::framed::Received;
use super::handshake::{Link, Local, Taken, connect, take, unexpected};
use super::identity::Identity;
use super::locked;
use super::options::TransferOptions;
use super::stats::Counters;
use crate::backend::await_device;
use crate::error::{BackendError, TransferError};

/// The properties that all processes of a model must have in common.
pub(crate) fn identity(fields: impl IntoIterator<Item = (&'static str, String)>) -> Identity {
    let fields = fields.into_iter();
    let fields: BTreeMap<String, String> = fields
        .map(|(name, value)| (name.to_owned(), value))
        .collect();
    Identity::received(fields)
}

/// The thread that drives all connections of a process.
pub(crate) fn runtime() -> Result<Runtime, TransferError> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("ranks")
        .enable_all()
        .build()
        .map_err(|error| TransferError::io("starting the thread of the ranks", error))
}

fn local(identity: Identity, options: &TransferOptions) -> Arc<Local> {
    Arc::new(Local {
        identity,
        options: options.clone(),
        counters: Arc::new(Counters::default()),
    })
}

/// The bit of a call's number that says which process made it: set, the one that connected.
const DIALLED: u32 = 1 << 31;

/// A connection to another process, after its handshake.
pub(crate) struct Peer {
    /// `None` after this process closed the connection.
    outbox: Mutex<Option<UnboundedSender<(u32, Frame)>>>,
    /// What the other process calls itself: the number of a node.
    number: u128,
    /// [`DIALLED`] or 0, in the numbers of this process' calls.
    side: u32,
    shared: Arc<Shared>,
    /// The other process' calls, if it connected to an [`Acceptor`] that answers some.
    calls: Mutex<Option<Receiver<(u32, Bytes)>>>,
}

/// The receiver of the other process' calls.
type Take = Box<dyn FnMut(u32, Bytes) + Send>;

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    next: u32,
    waiting: HashMap<u32, Arc<Slot>>,
    /// Why the connection ended.
    ended: Option<String>,
}

/// The place of an answer.
#[derive(Default)]
struct Slot {
    answer: Mutex<Option<Result<Bytes, String>>>,
    came: Condvar,
}

impl Slot {
    fn put(&self, answer: Result<Bytes, String>) {
        *locked(&self.answer) = Some(answer);
        self.came.notify_all();
    }
}

impl Shared {
    fn end(&self, reason: &str) {
        let mut state = locked(&self.state);
        state.ended.get_or_insert_with(|| reason.to_owned());
        for (_, slot) in state.waiting.drain() {
            slot.put(Err(reason.to_owned()));
        }
    }
}

/// Accepts the connections of other processes. Many may be in their handshake at a time, so that one that says nothing does not
/// keep others out.
pub(crate) struct Acceptor {
    listener: TcpListener,
    local: Arc<Local>,
    /// Whether the calls of those who connect are kept, to be answered.
    answers: bool,
    shaking: JoinSet<Option<Peer>>,
}

impl Acceptor {
    pub(crate) fn new(
        listener: TcpListener,
        identity: Identity,
        options: &TransferOptions,
    ) -> Self {
        Self {
            listener,
            local: local(identity, options),
            answers: false,
            shaking: JoinSet::new(),
        }
    }

    /// The same; calls of those who connect are in [`Peer::calls`].
    #[cfg(feature = "data-parallel")]
    pub(crate) fn answering(self) -> Self {
        Self {
            answers: true,
            ..self
        }
    }

    /// The next process that finishes its handshake; those that fail it are told why and closed.
    pub(crate) async fn next(&mut self) -> Result<Peer, TransferError> {
        loop {
            let room = self.shaking.len() < self.local.options.max_handshakes;
            tokio::select! {
                accepted = self.listener.accept(), if room => {
                    let accepted = accepted
                        .map_err(|error| TransferError::io("accepting a connection", error))?;
                    let local = Arc::clone(&self.local);
                    self.shaking.spawn(handshake(accepted, local, self.answers));
                }
                Some(done) = self.shaking.join_next() => {
                    if let Ok(Some(peer)) = done {
                        return Ok(peer);
                    }
                }
            }
        }
    }
}

async fn handshake(
    (socket, address): (TcpStream, SocketAddr),
    local: Arc<Local>,
    answers: bool,
) -> Option<Peer> {
    let shaken = timeout(local.options.handshake_timeout, async {
        let mut taken = take(socket, &local).await?;
        match taken.authenticate(&local).await {
            Ok(number) => Ok((taken, number)),
            Err(error) => {
                taken.refuse(&error, true).await;
                Err(error)
            }
        }
    });
    match shaken.await {
        Ok(Ok((taken, number))) => {
            let (sender, calls) = channel();
            let take: Take = Box::new(move |number, bytes| drop(sender.send((number, bytes))));
            let (take, calls) = match answers {
                true => (Some(take), Some(calls)),
                false => (None, None),
            };
            let peer = start(Taken::link(taken), number, 0, &local, take);
            *locked(&peer.calls) = calls;
            Some(peer)
        }
        Ok(Err(error)) => {
            tracing::warn!("a node at {address} was refused: {error}");
            None
        }
        Err(_) => {
            tracing::warn!("a connection of {address} did not finish its handshake");
            None
        }
    }
}

/// Connects to the process at `address`. Its calls go to `take`.
pub(crate) async fn dial(
    address: &str,
    number: u128,
    identity: &Identity,
    options: &TransferOptions,
    take: Take,
) -> Result<Peer, TransferError> {
    let local = local(identity.clone(), options);
    let link = connect(address, number, &local).await?;
    Ok(start(link, number, DIALLED, &local, Some(take)))
}

fn start(link: Link, number: u128, side: u32, local: &Arc<Local>, mut take: Option<Take>) -> Peer {
    let (outbox, queued) = unbounded_channel();
    let shared = Arc::<Shared>::default();
    let answers = Arc::clone(&shared);
    let (heartbeat, counters) = (local.options.heartbeat, Arc::clone(&local.counters));
    tokio::spawn(async move {
        let received = |received: Received| match received.frame {
            Frame::Message { bytes } => {
                if received.transfer & DIALLED == side {
                    let slot = locked(&answers.state).waiting.remove(&received.transfer);
                    if let Some(slot) = slot {
                        slot.put(Ok(bytes));
                    }
                } else if let Some(take) = &mut take {
                    take(received.transfer, bytes);
                }
                Ok(())
            }
            other => Err(unexpected("message", &other)),
        };
        let end = connection::run(link, queued, NoItems, heartbeat, counters, received).await;
        let reason = end.map_or_else(|| "it was closed".to_owned(), |error| error.to_string());
        answers.end(&reason);
    });
    Peer {
        outbox: Mutex::new(Some(outbox)),
        number,
        side,
        shared,
        calls: Mutex::default(),
    }
}

impl Peer {
    /// Sends a call; its answer is awaited by what is returned.
    pub(crate) fn call(&self, bytes: Vec<u8>) -> Pending {
        let slot = Arc::<Slot>::default();
        let mut state = locked(&self.shared.state);
        if let Some(reason) = &state.ended {
            slot.put(Err(reason.clone()));
        } else {
            let number = state.next | self.side;
            state.next = state.next.wrapping_add(1) & !DIALLED;
            state.waiting.insert(number, Arc::clone(&slot));
            let frame = Frame::Message {
                bytes: bytes.into(),
            };
            self.send(number, frame);
        }
        drop(state);
        Pending {
            slot,
            node: self.number,
            driven: false,
        }
    }

    /// Answers a call of the other process.
    pub(crate) fn answer(&self, number: u32, bytes: Vec<u8>) {
        let bytes = bytes.into();
        self.send(number, Frame::Message { bytes });
    }

    fn send(&self, number: u32, frame: Frame) {
        // The receiver ends with the connection, which completes what waits for answers.
        if let Some(outbox) = &*locked(&self.outbox) {
            drop(outbox.send((number, frame)));
        }
    }

    /// The calls of the other process, once, if [`Acceptor::answering`] has them kept. They end with the connection.
    #[cfg(feature = "data-parallel")]
    pub(crate) fn calls(&self) -> Option<Receiver<(u32, Bytes)>> {
        locked(&self.calls).take()
    }

    /// Ends the connection.
    #[cfg(feature = "data-parallel")]
    pub(crate) fn close(&self) {
        *locked(&self.outbox) = None;
        self.shared.end("it was closed");
    }

    /// The number of the node on the other side.
    pub(crate) fn number(&self) -> usize {
        usize::try_from(self.number).unwrap_or(usize::MAX)
    }

    /// Whether both are the same connection.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }

    /// Why the connection has ended, if it has.
    pub(crate) fn ended(&self) -> Option<String> {
        locked(&self.shared.state).ended.clone()
    }
}

/// The pending answer to a call.
pub(crate) struct Pending {
    slot: Arc<Slot>,
    node: u128,
    driven: bool,
}

impl Pending {
    fn lost(&self, reason: String) -> BackendError {
        BackendError::Lost {
            backend: "remote",
            reason: format!("the connection to node {} ended: {reason}", self.node),
        }
    }
}

impl Future for Pending {
    type Output = Result<Bytes, BackendError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let answer = locked(&self.slot.answer).take();
        match answer {
            Some(Ok(bytes)) => return Poll::Ready(Ok(bytes)),
            Some(Err(reason)) => return Poll::Ready(Err(self.lost(reason))),
            None => {}
        }
        if !std::mem::replace(&mut self.driven, true) {
            let slot = Arc::clone(&self.slot);
            await_device(cx, "remote", move || {
                let answer = locked(&slot.answer);
                let came = slot.came.wait_while(answer, |answer| answer.is_none());
                drop(came);
            })?;
        }
        Poll::Pending
    }
}
