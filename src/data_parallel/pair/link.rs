//! The connection to the other process of a pair, as it comes and goes, and the way to its device.

use std::sync::{Arc, Mutex, PoisonError};

use super::message::Call;
use crate::backend::{Result, Ticket, WeightSource};
use crate::error::BackendError;
use crate::ranks::{Line, Reply, Request, encode, reply};
use crate::transfer::peers::Peer;

/// The present connection, if there is one.
#[derive(Default)]
pub(super) struct Link(Mutex<Option<Arc<Peer>>>);

impl Link {
    /// The connection.
    ///
    /// # Errors
    /// [`BackendError::Lost`] if there is none.
    pub(super) fn peer(&self) -> Result<Arc<Peer>> {
        let peer = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        peer.clone().ok_or_else(|| BackendError::Lost {
            backend: "remote",
            reason: "the other process of the pair is not connected".to_owned(),
        })
    }

    /// Another one from now on.
    pub(super) fn set(&self, peer: Option<Arc<Peer>>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = peer;
    }

    /// Ends it.
    pub(super) fn close(&self) {
        if let Ok(peer) = self.peer() {
            peer.close();
        }
        self.set(None);
    }

    /// Whether there is one that has not ended.
    pub(super) fn is_connected(&self) -> bool {
        self.peer().is_ok_and(|peer| peer.ended().is_none())
    }
}

/// The way to the device of the other process.
#[derive(Clone)]
pub(super) struct DeviceLine(pub(super) Arc<Link>);

impl Line for DeviceLine {
    fn call(&self, request: Request) -> Result<Ticket<Reply>> {
        let peer = self.0.peer()?;
        let pending = peer.call(encode(&Call::Device(request))?);
        Ok(Ticket::new(async move { reply(&peer, &pending.await?) }))
    }

    fn weight(&self, source: WeightSource) -> Result<Request> {
        // The other process has loaded the same model.
        Ok(Request::Use {
            name: source.name,
            tensors: source.tensors,
            place: source.place,
            shape: [source.stack, source.rows, source.columns],
        })
    }

    fn recover(&mut self) -> Result<bool> {
        self.0.peer()?;
        Ok(true)
    }
}
