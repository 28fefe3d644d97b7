//! Caches on the wire: layer records from one process to another over TCP, as a prefill makes them.
//!
//! A [`Producer`] offers what its engine computes; a [`Consumer`] connects to it and fetches a transfer by name, over several
//! connections at once. Both compare whose caches they are and prove a shared secret before a record is sent. A transfer outlives
//! lost connections, and either side can end it. `docs/transfer.md` has the protocol, frame by frame.
//!
//! This module knows records and bytes: which request they are of, and what a hand-off says, is the engines' business.

mod connection;
mod consumer;
pub mod frame;
mod frame_fields;
mod framed;
mod handshake;
mod identity;
mod options;
mod producer;
mod record_head;
mod stats;
mod tcp_info;
mod tls;

use std::sync::{Mutex, MutexGuard, PoisonError};

pub use consumer::{Consumer, Incoming};
pub use identity::Identity;
pub use options::{Secret, TransferOptions};
pub use producer::{HandOffFuture, Offer, Outgoing, Producer, RecordSource, TransferOutcome};
pub use stats::TransferStats;
pub use tls::{Tls, TlsPem};

/// Takes a lock. What a thread that panicked left in it is whole: no method stops halfway.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
