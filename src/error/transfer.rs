//! What can be wrong with a transfer of caches between processes.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::CacheError;

/// What can be wrong with a transfer of caches between processes.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransferError {
    /// An address that cannot be listened on.
    #[error("cannot listen for transfers on {address}: {source}")]
    Listen {
        /// The address.
        address: String,
        /// What the system said.
        source: Arc<io::Error>,
    },
    /// A producer that cannot be reached.
    #[error(
        "cannot connect to the producer at {address}: {source}; check kv_ip, kv_port and that it runs"
    )]
    Connect {
        /// Its address.
        address: String,
        /// What the system said.
        source: Arc<io::Error>,
    },
    /// A connection that broke off.
    #[error("the connection broke off while {action}: {source}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// What the system said.
        source: Arc<io::Error>,
    },
    /// Something that did not happen in time.
    #[error("{what} took longer than {limit:?}")]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// How long.
        limit: Duration,
    },
    /// A certificate, a key or a name that TLS cannot use.
    #[error("TLS: {what}")]
    Tls {
        /// What is wrong, and with what.
        what: String,
    },
    /// A secret that cannot be used.
    #[error("the shared secret should have at least {least} bytes, but has {found}")]
    ShortSecret {
        /// Bytes that it needs.
        least: usize,
        /// Bytes that it has.
        found: usize,
    },
    /// Bytes that another protocol sends.
    #[error(
        "not a peer for cache transfers: it should begin with {expected:?}, but begins with {found:?}"
    )]
    NotAPeer {
        /// What peers begin with.
        expected: String,
        /// What came.
        found: String,
    },
    /// A peer of another version.
    #[error(
        "this side speaks version {ours} of the transfer protocol, but the peer speaks version {theirs}: run the same release on both sides"
    )]
    Version {
        /// The version of this side.
        ours: u16,
        /// The version of the peer.
        theirs: u16,
    },
    /// A peer that does not know the shared secret.
    #[error(
        "the peer's proof of the shared secret is wrong: both sides must be given the same secret"
    )]
    Secret,
    /// A peer whose caches are others.
    #[error("the {what} of this side is {ours}, but that of the peer is {theirs}")]
    Mismatch {
        /// Which property.
        what: String,
        /// Its value on this side.
        ours: String,
        /// Its value on the other side.
        theirs: String,
    },
    /// A frame that no peer of this version sends.
    #[error("a frame's {what} should be {expected}, but is {found}")]
    Frame {
        /// Which part of it.
        what: &'static str,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// A record that is damaged or of other caches.
    #[error(transparent)]
    Record(Arc<CacheError>),
    /// A peer that refused, with its own sentence.
    #[error("the peer refused: {sentence}")]
    Refused {
        /// Why, as a number that programs can tell apart.
        refusal: Refusal,
        /// Why, in words.
        sentence: String,
    },
    /// A transfer that one of the sides gave up.
    #[error("the transfer was cancelled: {reason}")]
    Cancelled {
        /// Why.
        reason: String,
    },
    /// A peer that stayed away.
    #[error("the connection to {peer} was lost and did not come back within {limit:?}")]
    Lost {
        /// Its address.
        peer: String,
        /// How long it was waited for.
        limit: Duration,
    },
    /// A second offer under one name.
    #[error("a transfer {id:?} is already offered: transfer_id must differ between requests")]
    Duplicate {
        /// The name.
        id: String,
    },
    /// A name that does not fit a frame.
    #[error("a transfer_id should have 1 to {limit} bytes, but this one has {found}")]
    IdLength {
        /// The most bytes.
        limit: usize,
        /// Its bytes.
        found: usize,
    },
    /// A transfer in a role that was not configured.
    #[error("caches are not transferred in this direction: this instance is no {0}")]
    NoRole(&'static str),
    /// A producer or consumer that was shut down.
    #[error("cache transfers are shut down on this side")]
    Closed,
}

/// Why a peer refused, as it stands in a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The proof of the shared secret is wrong.
    Secret,
    /// Another version of the protocol, or another protocol.
    Version,
    /// Another model, weight format, cache dtype, layout or head range.
    Identity,
    /// Too many connections or transfers.
    Busy,
    /// A frame that is damaged or out of order, or a handshake that took too long.
    Protocol,
    /// No such transfer was offered in time, or it is gone.
    Unknown,
    /// Another consumer fetches it.
    Taken,
    /// It is of other tokens than the consumer asked for.
    Caches,
    /// The producer's request failed.
    Failed,
    /// The producer shuts down.
    Closing,
}

impl Refusal {
    /// All of them, in the order of their numbers, from 1.
    const ALL: [Self; 10] = [
        Self::Secret,
        Self::Version,
        Self::Identity,
        Self::Busy,
        Self::Protocol,
        Self::Unknown,
        Self::Taken,
        Self::Caches,
        Self::Failed,
        Self::Closing,
    ];

    /// Its number in a frame.
    #[must_use]
    pub fn code(self) -> u16 {
        self as u16 + 1
    }

    /// That of this number in a frame.
    #[must_use]
    pub fn from_code(code: u16) -> Option<Self> {
        let index = usize::from(code).checked_sub(1)?;
        Self::ALL.get(index).copied()
    }
}

impl TransferError {
    /// The reason that is sent to a peer.
    #[must_use]
    pub fn refusal(&self) -> Refusal {
        match self {
            Self::Refused { refusal, .. } => *refusal,
            Self::Secret => Refusal::Secret,
            Self::NotAPeer { .. } | Self::Version { .. } => Refusal::Version,
            Self::Mismatch { .. } => Refusal::Identity,
            Self::Closed => Refusal::Closing,
            _ => Refusal::Protocol,
        }
    }

    /// Whether the same peer would say the same again: the secret, the version or what the caches are of.
    #[must_use]
    pub fn is_lasting(&self) -> bool {
        let refusal = match self {
            Self::Tls { .. } => return true,
            Self::Secret | Self::NotAPeer { .. } | Self::Version { .. } | Self::Mismatch { .. } => {
                self.refusal()
            }
            Self::Refused { refusal, .. } => *refusal,
            _ => return false,
        };
        matches!(
            refusal,
            Refusal::Secret | Refusal::Version | Refusal::Identity
        )
    }

    /// An error of a socket while `action` was done.
    pub(crate) fn io(action: &'static str, source: io::Error) -> Self {
        Self::Io {
            action,
            source: Arc::new(source),
        }
    }

    /// A part of a frame that is not as it should be.
    pub(crate) fn frame(what: &'static str, expected: impl ToString, found: impl ToString) -> Self {
        Self::Frame {
            what,
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }
}
