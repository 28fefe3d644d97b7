//! The process of a pair that listens: its controller decides for both.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use super::engine::RemoteEngine;
use super::link::Link;
use super::message::Call;
use super::serve::serve;
use super::{FOLLOWER, LEADER};
use crate::backend::Lent;
use crate::data_parallel::members::{Member, Members};
use crate::engine::EngineHandle;
use crate::error::BackendError;
use crate::ranks::decode;
use crate::transfer::peers::{Acceptor, Peer};

/// How long it is waited for the end of the engine.
const MOST_TIME: Duration = Duration::from_secs(10);

/// Both engines, as the controller asks them.
pub(super) struct Leader {
    engine: EngineHandle,
    other: RemoteEngine,
    link: Arc<Link>,
    lent: Arc<Lent>,
    /// A process that has connected and is not used yet.
    arrived: Mutex<Option<Arc<Peer>>>,
    /// Lends the device to the one that is used.
    serving: Mutex<Option<JoinHandle<()>>>,
}

impl Leader {
    pub(super) fn new(engine: EngineHandle, link: Arc<Link>, lent: Arc<Lent>) -> Arc<Self> {
        Arc::new(Self {
            engine,
            other: RemoteEngine(Arc::clone(&link)),
            link,
            lent,
            arrived: Mutex::default(),
            serving: Mutex::default(),
        })
    }

    pub(super) fn is_connected(&self) -> bool {
        self.link.is_connected()
    }

    /// Ends the connection, and what the other process has here.
    pub(super) fn close(&self) {
        self.link.close();
        let serving = self.serving.lock();
        let serving = serving.unwrap_or_else(PoisonError::into_inner).take();
        if let Some(serving) = serving {
            let _ = serving.join();
        }
    }

    fn arrived(&self) -> Option<Arc<Peer>> {
        let arrived = self.arrived.lock().unwrap_or_else(PoisonError::into_inner);
        arrived.clone().filter(|peer| peer.ended().is_none())
    }

    fn set_arrived(&self, peer: Option<Arc<Peer>>) {
        *self.arrived.lock().unwrap_or_else(PoisonError::into_inner) = peer;
    }
}

impl Members for Leader {
    fn engine(&self, replica: usize) -> &dyn Member {
        match replica {
            LEADER => &self.engine,
            _ => &self.other,
        }
    }

    fn end(&self, replica: usize) {
        self.close();
        if replica == LEADER {
            self.engine.stop(MOST_TIME);
        }
    }

    fn migrated(&self) -> u64 {
        0
    }

    fn returned(&self) -> Option<usize> {
        let free = self.link.peer().is_err() && self.engine.is_running();
        (free && self.arrived().is_some()).then_some(FOLLOWER)
    }

    fn begin(&self, _replica: usize) {
        let Some(peer) = self.arrived() else { return };
        self.set_arrived(None);
        let Some(calls) = peer.calls() else { return };
        self.link.set(Some(Arc::clone(&peer)));
        let lent = Arc::clone(&self.lent);
        let serving = std::thread::Builder::new()
            .name("lent device".to_owned())
            .spawn(move || {
                let requests = calls.into_iter().map(|(number, bytes)| {
                    let request = decode(&bytes).and_then(|call| match call {
                        Call::Device(request) => Ok(request),
                        Call::Engine(_) => Err(BackendError::Unsupported {
                            backend: "remote",
                            what: "orders from the process that follows".to_owned(),
                        }),
                    });
                    (number, request)
                });
                serve(&lent, &peer, requests);
            });
        match serving {
            Ok(serving) => {
                let mut place = self.serving.lock().unwrap_or_else(PoisonError::into_inner);
                *place = Some(serving);
            }
            Err(error) => {
                tracing::error!("no thread to lend the device: {error}");
                self.link.close();
            }
        }
    }
}

/// Accepts the connections of other processes, for as long as the leader is there.
pub(super) async fn accept(mut acceptor: Acceptor, leader: Weak<Leader>) {
    loop {
        let peer = match acceptor.next().await {
            Ok(peer) => peer,
            Err(error) => {
                // Too many open files, for example: the next one may succeed.
                tracing::warn!("{error}");
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
        };
        let Some(leader) = leader.upgrade() else {
            return;
        };
        if leader.link.is_connected() || leader.arrived().is_some() {
            tracing::warn!("a process wants to pair with this one, which has another already");
            peer.close();
            continue;
        }
        leader.set_arrived(Some(Arc::new(peer)));
    }
}
