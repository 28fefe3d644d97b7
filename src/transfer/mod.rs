//! Transfer of caches: layer records from one process to another over TCP, as they are computed by a prefill.
//!
//! A [`Producer`] offers what its engine computes; a [`Consumer`] connects to it and fetches a transfer by name, over several
//! connections at once. Both compare their identities and prove a shared secret before any record is sent. A transfer
//! survives lost connections, and either side can cancel it. `docs/transfer.md` specifies the protocol, frame by frame.
//!
//! This module handles records and bytes; the engines know which request they belong to, and the content of a hand-off.

mod connection;
mod consumer;
pub mod frame;
mod frame_fields;
mod framed;
mod handshake;
mod identity;
mod options;
pub(crate) mod peers;
mod producer;
mod record_head;
mod stats;
mod tcp_info;
pub(crate) mod tls;

use std::sync::{Mutex, MutexGuard, PoisonError};

pub use consumer::{Consumer, Incoming};
pub use identity::Identity;
pub use options::{Secret, TransferOptions};
pub use producer::{HandOffFuture, Offer, Outgoing, Producer, RecordSource, TransferOutcome};
pub use stats::TransferStats;
pub use tls::{Tls, TlsPem};

/// Takes a lock. After a panic in another thread the data is still consistent, since no method stops halfway.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
