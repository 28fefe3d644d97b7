//! The connections of the process with rank 0 to its nodes, and how a node that comes back is made ready again.
//!
//! What the ranks of a node have made (weights, tensors, pools) is kept as the calls that made it. A node that connects again
//! is asked for the same, and gives the same handles. So the ranks of other processes keep theirs, and nothing is loaded there
//! again.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

use super::message::{Call, Reply, Request, decode, encode};
use super::remote::{RankLine, Remote};
use crate::backend::{Backend, Parallelism, Result, block_on};
use crate::error::{BackendError, TransferError};
use crate::transfer::peers::{self, Acceptor, Peer};
use crate::transfer::{Identity, TransferOptions};

/// Listens for the nodes of a model, in the process with rank 0.
pub struct Nodes {
    runtime: Arc<Runtime>,
    address: std::net::SocketAddr,
    connections: Arc<Connections>,
}

/// The connection to each node.
pub(super) struct Connections {
    nodes: Mutex<BTreeMap<usize, Node>>,
    came: Condvar,
}

/// A node, as its connections come and go.
#[derive(Default)]
struct Node {
    /// The last connection.
    peer: Option<Arc<Peer>>,
    /// Why the node of that connection cannot be used yet.
    missing: Option<String>,
    /// The calls that made something, with their answers.
    made: Vec<(Vec<u8>, Bytes)>,
}

impl Node {
    fn is_connected(&self) -> bool {
        let peer = self.peer.as_ref();
        peer.is_some_and(|peer| peer.ended().is_none())
    }

    /// Whether a connection is its last one.
    fn is_last(&self, peer: &Peer) -> bool {
        self.peer.as_ref().is_some_and(|last| last.is(peer))
    }
}

impl Nodes {
    /// Listens at `address` for the nodes 1 to `nodes` - 1.
    ///
    /// # Errors
    /// An address that cannot be listened on.
    pub fn listen(
        address: &str,
        nodes: usize,
        identity: Identity,
        options: &TransferOptions,
    ) -> std::result::Result<Self, TransferError> {
        let runtime = peers::runtime()?;
        let listener = runtime.block_on(TcpListener::bind(address));
        let failed = |error| TransferError::io("listening for nodes", error);
        let listener = listener.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let connections = Arc::new(Connections {
            nodes: Mutex::new((1..nodes).map(|node| (node, Node::default())).collect()),
            came: Condvar::new(),
        });
        let acceptor = Acceptor::new(listener, identity, options);
        runtime.spawn(accept(acceptor, Arc::clone(&connections)));
        Ok(Self {
            runtime: Arc::new(runtime),
            address,
            connections,
        })
    }

    /// The address that nodes connect to.
    #[must_use]
    pub fn address(&self) -> std::net::SocketAddr {
        self.address
    }

    /// Waits until all nodes have connected, and returns their ranks, `ranks` of each node, in their order. `joined` receives
    /// the number of each node. A node whose connection ends later may connect again;
    /// [`Backend::recover`] of its ranks makes them usable then.
    ///
    /// # Errors
    /// A node with another number of ranks, or one that is lost again.
    pub fn gather(
        self,
        ranks: usize,
        degrees: Parallelism,
        joined: &mut dyn FnMut(usize),
    ) -> Result<Vec<Box<dyn Backend>>> {
        let mut remote: Vec<Box<dyn Backend>> = Vec::new();
        for (node, peer) in self.connections.all(joined) {
            let Reply::Devices(devices) = self.connections.make(&peer, 0, Request::Devices)? else {
                return Err(unexpected());
            };
            if devices.len() != ranks {
                return Err(BackendError::Shape {
                    operation: "several devices",
                    what: "the number of a node's ranks",
                    expected: ranks.to_string(),
                    found: format!("{} (node {node})", devices.len()),
                });
            }
            for (rank, device) in devices.into_iter().enumerate() {
                let line = RankLine {
                    _runtime: Arc::clone(&self.runtime),
                    connections: Arc::clone(&self.connections),
                    peer: Arc::clone(&peer),
                    rank,
                    degrees,
                    in_stage: (node * ranks + rank) % degrees.width(),
                };
                remote.push(Box::new(Remote::new(line, device.device(node))));
            }
        }
        Ok(remote)
    }
}

impl Connections {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<usize, Node>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for all nodes.
    fn all(&self, joined: &mut dyn FnMut(usize)) -> Vec<(usize, Arc<Peer>)> {
        let mut known = Vec::new();
        let mut nodes = self.lock();
        loop {
            for (number, node) in nodes.iter() {
                if node.is_connected() && !known.contains(number) {
                    known.push(*number);
                    joined(*number);
                }
            }
            if nodes.values().all(Node::is_connected) {
                let peers = nodes.iter();
                let peers = peers.filter_map(|(number, node)| Some((*number, node.peer.clone()?)));
                return peers.collect();
            }
            nodes = (self.came.wait(nodes)).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Has a rank of a node make something, which it will make again when it has been away.
    pub(super) fn make(&self, peer: &Peer, rank: usize, request: Request) -> Result<Reply> {
        let call = encode(&Call { rank, request })?;
        let answer = block_on(peer.call(call.clone()))?;
        let reply = reply(peer, &answer)?;
        let number = peer.number();
        match self.lock().get_mut(&number) {
            Some(node) if node.is_last(peer) => node.made.push((call, answer)),
            _ => return Err(lost(number, "it has connected again")),
        }
        Ok(reply)
    }

    /// The connection of a node that has made again what it had made before.
    ///
    /// # Errors
    /// [`BackendError::Lost`] of a node that has not come back, or not made it yet.
    pub(super) fn again(&self, number: usize) -> Result<Arc<Peer>> {
        let nodes = self.lock();
        let node = nodes.get(&number);
        let peer = node.and_then(|node| node.peer.clone().filter(|_| node.is_connected()));
        let missing = match (&peer, node.and_then(|node| node.missing.clone())) {
            (None, _) => "it has not connected again yet".to_owned(),
            (Some(_), Some(missing)) => missing,
            (Some(peer), None) => return Ok(Arc::clone(peer)),
        };
        Err(lost(number, &missing))
    }

    /// Has a node that connected again make what it had made before.
    async fn make_again(&self, peer: &Peer) {
        let number = peer.number();
        let made = match self.lock().get(&number) {
            Some(node) => node.made.clone(),
            None => return,
        };
        // All are sent before the first answer comes: the node has them one after the other without a pause.
        let pending: Vec<_> = made
            .iter()
            .map(|(call, _)| peer.call(call.clone()))
            .collect();
        let mut failed = None;
        for (pending, (_, before)) in pending.into_iter().zip(&made) {
            failed = match pending.await {
                Ok(answer) if answer == *before => continue,
                Ok(answer) => Some(match reply(peer, &answer) {
                    Err(error) => error.to_string(),
                    Ok(Reply::Devices(_)) => "it has other devices than before".to_owned(),
                    Ok(_) => "it has made something else than before".to_owned(),
                }),
                Err(error) => Some(error.to_string()),
            };
            break;
        }
        match &failed {
            None => tracing::info!("node {number} is ready again"),
            Some(reason) => tracing::error!("node {number} came back, but {reason}"),
        }
        if let Some(node) = self.lock().get_mut(&number)
            && node.is_last(peer)
        {
            node.missing = failed.map(|reason| format!("it came back, but {reason}"));
        }
    }
}

/// Accepts the connections of nodes, for as long as the runtime runs.
async fn accept(mut acceptor: Acceptor, connections: Arc<Connections>) {
    loop {
        let peer = match acceptor.next().await {
            Ok(peer) => Arc::new(peer),
            Err(error) => {
                // Too many open files, for example: the next one may succeed.
                tracing::warn!("{error}");
                tokio::time::sleep(std::time::Duration::from_secs(1)).await;
                continue;
            }
        };
        let number = peer.number();
        let mut nodes = connections.lock();
        let node = nodes.get_mut(&number).filter(|node| !node.is_connected());
        let Some(node) = node else {
            tracing::warn!("a node called itself node {number}, which is not missing");
            continue;
        };
        node.peer = Some(Arc::clone(&peer));
        let again = !node.made.is_empty();
        node.missing = again.then(|| "it is loading its weights again".to_owned());
        if again {
            tracing::info!("node {number} has come back and loads its weights");
            let connections = Arc::clone(&connections);
            tokio::spawn(async move { connections.make_again(&peer).await });
        }
        connections.came.notify_all();
    }
}

/// The reply in a node's answer, or the error of its rank.
///
/// # Errors
/// The rank's error, or bytes that are no reply.
pub(crate) fn reply(peer: &Peer, answer: &[u8]) -> Result<Reply> {
    let node = peer.number();
    match decode(answer)? {
        Reply::Failed(failure) if failure.lost => Err(BackendError::Lost {
            backend: "remote",
            reason: format!("node {node}: {}", failure.what),
        }),
        Reply::Failed(failure) => Err(BackendError::Driver {
            backend: "remote",
            what: format!("a call of node {node}"),
            reason: failure.what,
        }),
        reply => Ok(reply),
    }
}

fn lost(number: usize, reason: &str) -> BackendError {
    BackendError::Lost {
        backend: "remote",
        reason: format!("the connection to node {number} ended, and {reason}"),
    }
}

/// An answer that does not fit the call.
pub(super) fn unexpected() -> BackendError {
    BackendError::Driver {
        backend: "remote",
        what: "an answer".to_owned(),
        reason: "it answers another call".to_owned(),
    }
}
