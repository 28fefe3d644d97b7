//! Options of both sides of a transfer: limits, timeouts, and authentication.

use std::time::Duration;

use ring::hmac;

use super::tls::Tls;
use crate::error::TransferError;

/// Minimum length of a shared secret in bytes: a shorter one can be found by trial from an overheard handshake.
const LEAST_SECRET: usize = 16;

/// A secret that both sides know. It is never sent: each side proves that it knows it.
#[derive(Clone)]
pub struct Secret {
    pub(super) key: hmac::Key,
}

impl Secret {
    /// A secret of these bytes, which should be random: secrets can be tried against a handshake that was overheard without
    /// TLS.
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

    /// No secret: any process that reaches the port and serves the same model can fetch offered caches. For tests, and for
    /// networks that are protected by other means.
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

/// Options of transfers. The two sides may differ in all of them except the secret and the use of TLS.
#[derive(Clone, Debug)]
pub struct TransferOptions {
    /// Number of TCP connections that a consumer opens to a producer.
    pub connections: usize,
    /// Maximum bytes of a transfer in flight: taken from the sending engine and not yet taken by the receiving one. The
    /// smaller value of both sides counts. One record more may be held that does not fit.
    pub window_bytes: usize,
    /// Maximum size of a record or a hand-off in bytes. A larger frame is refused before memory is allocated for it.
    pub max_record_bytes: usize,
    /// The shared secret.
    pub secret: Secret,
    /// TLS, and the certificates that each side requires. Without it everything but the secret can be read on the network.
    pub tls: Option<Tls>,
    /// Maximum time between two frames that a side sends.
    pub heartbeat: Duration,
    /// Time without a byte after which a connection is lost.
    pub dead_after: Duration,
    /// Maximum time from the first byte of a connection to the end of its handshake.
    pub handshake_timeout: Duration,
    /// Time for which both sides keep a transfer without any connection.
    pub resume_timeout: Duration,
    /// Time for which a producer keeps complete caches that are not fetched, and a fetch waits for its offer.
    pub hold_timeout: Duration,
    /// Maximum number of connections of a producer, including those in their handshake.
    pub max_connections: usize,
    /// Maximum number of connections in their handshake; beyond it the oldest is refused.
    pub max_handshakes: usize,
    /// Maximum number of transfers of one consumer, waiting and active.
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
