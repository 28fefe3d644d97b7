//! The side that receives caches and decodes (vLLM's `kv_consumer`).

mod incoming;
mod peer;
mod receiving;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

pub use self::incoming::Incoming;
use self::peer::Peer;
use super::frame::{Fetch, MAX_ID};
use super::handshake::Local;
use super::identity::Identity;
use super::locked;
use super::options::TransferOptions;
use super::stats::{Counters, TransferStats};
use crate::cache::CacheHeader;
use crate::error::TransferError;

/// Fetches transfers from producers. It keeps a pool of connections to each, opened with the first fetch and shared by all
/// transfers. Dropping it fails active transfers.
pub struct Consumer {
    local: Arc<Local>,
    counters: Arc<Counters>,
    peers: Mutex<HashMap<String, Arc<Peer>>>,
}

impl Consumer {
    /// A consumer of caches with this identity. It does not connect yet.
    #[must_use]
    pub fn new(identity: Identity, options: TransferOptions) -> Self {
        let counters = Arc::new(Counters::default());
        Self {
            local: Arc::new(Local {
                identity,
                options,
                counters: Arc::clone(&counters),
            }),
            counters,
            peers: Mutex::default(),
        }
    }

    /// Requests a transfer from the producer at `address` (`host:port`) and waits until the producer accepts, which it does
    /// when the transfer is offered there. The latents of the `have` leading tokens are cached here and not sent; states are
    /// always sent. Dropping the future cancels the request.
    ///
    /// # Errors
    /// A name that is empty or too long; a producer that cannot be reached, or refuses the connection or the transfer.
    pub async fn fetch(
        &self,
        address: &str,
        id: &str,
        have: usize,
        header: &CacheHeader,
    ) -> Result<Incoming, TransferError> {
        if id.is_empty() || id.len() > MAX_ID {
            return Err(TransferError::IdLength {
                limit: MAX_ID,
                found: id.len(),
            });
        }
        let fetch = Fetch {
            id: id.to_owned(),
            caches: header.id(),
            tokens: header.tokens.len() as u64,
            have: have as u64,
            window: self.local.options.window_bytes as u64,
            accepted: false,
        };
        // A pool that has just ended is replaced.
        let mut incoming = loop {
            let peer = self.peer(address)?;
            if let Some(incoming) = Incoming::begin(&peer, fetch.clone()) {
                break incoming;
            }
        };
        incoming.accepted().await?;
        Ok(incoming)
    }

    /// The pool of connections to an address.
    fn peer(&self, address: &str) -> Result<Arc<Peer>, TransferError> {
        let mut peers = locked(&self.peers);
        if let Some(peer) = peers.get(address).filter(|peer| !peer.is_over()) {
            return Ok(Arc::clone(peer));
        }
        peers.retain(|_, peer| !peer.is_over());
        let peer = Peer::open(address.to_owned(), Arc::clone(&self.local))?;
        peers.insert(address.to_owned(), Arc::clone(&peer));
        Ok(peer)
    }

    /// Counters since it was created.
    #[must_use]
    pub fn stats(&self) -> TransferStats {
        let counts = self.counters.snapshot();
        let mut stats = TransferStats {
            records_received: self.counters.records(),
            ..counts
        };
        for peer in locked(&self.peers).values() {
            let load = peer.load();
            stats.waiting += load.waiting;
            stats.active += load.active;
            stats.held_bytes += load.held;
        }
        stats
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        for peer in locked(&self.peers).values() {
            peer.fail(&TransferError::Closed);
        }
    }
}
