//! What both sides of a transfer are told: limits, times, and how they know each other.

use std::time::Duration;

use ring::hmac;

use super::tls::Tls;
use crate::error::TransferError;

/// The least bytes of a shared secret: what is shorter can be found by trying, from a handshake that was overheard.
const LEAST_SECRET: usize = 16;

/// A secret that both sides know. It is never sent: each side proves that it knows it.
#[derive(Clone)]
pub struct Secret {
    pub(super) key: hmac::Key,
}

impl Secret {
    /// The secret with these bytes, which should be random: from a handshake that was overheard without TLS, secrets can be
    /// tried.
    ///
    /// # Errors
    /// [`TransferError::ShortSecret`] below 16 bytes.
    pub fn new(bytes: &[u8]) -> Result<Self, TransferError> {
        if bytes.len() < LEAST_SECRET {
            return Err(TransferError::ShortSecret {
                least: LEAST_SECRET,
                found: bytes.len(),
            });
        }
        Ok(Self {
            key: hmac::Key::new(hmac::HMAC_SHA256, bytes),
        })
    }

    /// No secret: any process that reaches the port and serves the same model can fetch what is offered. For tests, and for networks
    /// that are closed by other means.
    #[must_use]
    pub fn none() -> Self {
        Self {
            key: hmac::Key::new(hmac::HMAC_SHA256, &[]),
        }
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

/// How transfers are done. The two sides may differ in all but the secret and whether there is TLS.
#[derive(Clone, Debug)]
pub struct TransferOptions {
    /// TCP connections that a consumer opens to a producer.
    pub connections: usize,
    /// Bytes of a transfer that may be on their way: taken from the sending engine and not yet taken by the receiving one. The
    /// smaller of both sides' counts. One record more is held where it does not fit.
    pub window_bytes: usize,
    /// The most bytes of a record or a hand-off. A frame that says more is refused before memory is taken for it.
    pub max_record_bytes: usize,
    /// What both sides prove that they know.
    pub secret: Secret,
    /// Encryption, and the certificates that each side asks for. Without it everything but the secret can be read on the way.
    pub tls: Option<Tls>,
    /// How often each side of a connection sends something.
    pub heartbeat: Duration,
    /// After how long without a byte a connection is given up.
    pub dead_after: Duration,
    /// How long a connection may take from the first byte to the end of the handshake.
    pub handshake_timeout: Duration,
    /// How long both sides keep a transfer when all connections are lost.
    pub resume_timeout: Duration,
    /// How long a producer keeps what is complete and not fetched, and lets a fetch wait for its offer.
    pub hold_timeout: Duration,
    /// Connections that a producer holds at once, with those in their handshake.
    pub max_connections: usize,
    /// Those in their handshake; when there are more, the oldest is refused.
    pub max_handshakes: usize,
    /// Transfers of one consumer, waiting and running.
    pub max_transfers: usize,
}

impl Default for TransferOptions {
    fn default() -> Self {
        Self {
            connections: 4,
            window_bytes: 64 << 20,
            max_record_bytes: 64 << 20,
            secret: Secret::none(),
            tls: None,
            heartbeat: Duration::from_secs(2),
            dead_after: Duration::from_secs(10),
            handshake_timeout: Duration::from_secs(5),
            resume_timeout: Duration::from_secs(30),
            hold_timeout: Duration::from_secs(120),
            max_connections: 256,
            max_handshakes: 64,
            max_transfers: 4096,
        }
    }
}
