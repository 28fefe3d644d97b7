//! The protocol's bytes: the opening of a connection, and its frames. No sockets.
//!
//! `docs/transfer.md` has the tables. All integers are little-endian. A frame is a header of 24 bytes, a head whose length is
//! in the header, which is read into memory at once, and a body: the elements of a record, or a hand-off, which has checksums
//! of its own.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::{BufMut, Bytes};
use xxhash_rust::xxh3::xxh3_64;

use super::frame_fields::{Fields, put_text};
use super::identity::Identity;
use super::record_head;
use crate::cache::LayerRecord;
use crate::error::{Refusal, TransferError};

/// The first bytes of a connection, on both sides.
pub const MAGIC: [u8; 4] = *b"KLKV";
/// The version of the protocol.
pub const VERSION: u16 = 1;
/// Length of the opening in bytes.
pub const OPENING: usize = 40;
/// Length of a frame's header in bytes.
pub const HEADER: usize = 24;
/// Maximum length of a head in bytes.
pub const MAX_HEAD: usize = 16 << 10;
/// Maximum length of a transfer's name in bytes.
pub const MAX_ID: usize = 1 << 10;
/// Maximum length of a message text in bytes.
const MAX_SENTENCE: usize = 4 << 10;
/// Maximum number of properties of an identity.
const MAX_FIELDS: usize = 64;

/// A random number of one side, which the other side's proof covers.
pub type Nonce = [u8; 32];
/// A proof of the shared secret, HMAC-SHA-256.
pub type Proof = [u8; 32];

/// The opening of a connection.
#[must_use]
pub fn opening(version: u16, nonce: &Nonce) -> [u8; OPENING] {
    let mut bytes = [0; OPENING];
    bytes[..4].copy_from_slice(&MAGIC);
    bytes[4..6].copy_from_slice(&version.to_le_bytes());
    bytes[8..].copy_from_slice(nonce);
    bytes
}

/// Reads the other side's nonce from its opening.
///
/// # Errors
/// Bytes of another protocol, or of another version of this one.
pub fn parse_opening(bytes: &[u8; OPENING]) -> Result<Nonce, TransferError> {
    if bytes[..4] != MAGIC {
        let shown = |bytes: &[u8]| bytes.escape_ascii().to_string();
        return Err(TransferError::NotAPeer {
            expected: shown(&MAGIC),
            found: shown(&bytes[..4]),
        });
    }
    let version = u16::from_le_bytes([bytes[4], bytes[5]]);
    if version != VERSION {
        return Err(TransferError::Version {
            ours: VERSION,
            theirs: version,
        });
    }
    let mut nonce = [0; 32];
    nonce.copy_from_slice(&bytes[8..]);
    Ok(nonce)
}

/// The kind of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// [`Frame::Prove`].
    Prove = 1,
    /// [`Frame::Welcome`].
    Welcome,
    /// [`Frame::Refused`].
    Refused,
    /// [`Frame::Ping`].
    Ping,
    /// [`Frame::Fetch`].
    Fetch,
    /// [`Frame::Accepted`].
    Accepted,
    /// [`Frame::Record`].
    Record,
    /// [`Frame::HandOff`].
    HandOff,
    /// [`Frame::Ack`].
    Ack,
    /// [`Frame::Complete`].
    Complete,
    /// [`Frame::Cancel`].
    Cancel,
    /// [`Frame::Message`].
    Message,
}

impl Kind {
    const ALL: [Self; 12] = [
        Self::Prove,
        Self::Welcome,
        Self::Refused,
        Self::Ping,
        Self::Fetch,
        Self::Accepted,
        Self::Record,
        Self::HandOff,
        Self::Ack,
        Self::Complete,
        Self::Cancel,
        Self::Message,
    ];
}

/// The header of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The kind of frame.
    pub kind: Kind,
    /// The transfer, as the consumer numbers it on these connections; 0 for none.
    pub transfer: u32,
    /// Length of the head in bytes.
    pub head: usize,
    /// Length of the body in bytes.
    pub body: usize,
    /// XXH3-64 of the header fields above and of the head.
    checksum: u64,
}

impl Header {
    /// Reads a header. No memory is allocated for the lengths in it.
    ///
    /// # Errors
    /// An unknown kind, a head or a body above the limit (`max_body`), or a body for a kind without one.
    pub fn parse(bytes: &[u8; HEADER], max_body: usize) -> Result<Self, TransferError> {
        let number = |at: usize| {
            let bytes = [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]];
            u32::from_le_bytes(bytes)
        };
        let kind = usize::from(bytes[0]).checked_sub(1);
        let kind = kind.and_then(|index| Kind::ALL.get(index).copied());
        let kind =
            kind.ok_or_else(|| TransferError::frame("kind", "a number from 1 to 12", bytes[0]))?;
        if bytes[1..4] != [0; 3] {
            let found = format!("{:?}", &bytes[1..4]);
            return Err(TransferError::frame("reserved bytes", "0", found));
        }
        let (head, body) = (number(8) as usize, number(12) as usize);
        let at_most = |what, limit: usize, found: usize| {
            let expected = || format!("at most {limit} bytes");
            let found = (found > limit).then(|| format!("{found} bytes"));
            found.map_or(Ok(()), |found| {
                Err(TransferError::frame(what, expected(), found))
            })
        };
        at_most("head", MAX_HEAD, head)?;
        let has_body = matches!(kind, Kind::Record | Kind::HandOff | Kind::Message);
        at_most("body", if has_body { max_body } else { 0 }, body)?;
        let (low, high) = (u64::from(number(16)), u64::from(number(20)));
        Ok(Self {
            kind,
            transfer: number(4),
            head,
            body,
            checksum: low | high << 32,
        })
    }

    fn bytes(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[0] = self.kind as u8;
        bytes[4..8].copy_from_slice(&self.transfer.to_le_bytes());
        bytes[8..12].copy_from_slice(&(self.head as u32).to_le_bytes());
        bytes[12..16].copy_from_slice(&(self.body as u32).to_le_bytes());
        bytes[16..].copy_from_slice(&self.checksum.to_le_bytes());
        bytes
    }

    /// XXH3-64 of the header's own fields and of the head.
    fn sum(&self, head: &[u8]) -> u64 {
        let bytes = self.bytes();
        let mut hash = xxhash_rust::xxh3::Xxh3::new();
        hash.update(&bytes[..16]);
        hash.update(head);
        hash.digest()
    }

    /// Checks header and head against the checksum.
    ///
    /// # Errors
    /// [`TransferError::Frame`] with both checksums.
    pub fn check(&self, head: &[u8]) -> Result<(), TransferError> {
        let sum = self.sum(head);
        if sum == self.checksum {
            return Ok(());
        }
        let hex = |sum: u64| format!("{sum:016x}");
        Err(TransferError::frame(
            "checksum",
            hex(self.checksum),
            hex(sum),
        ))
    }
}

/// A consumer's request for a transfer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetch {
    /// The transfer's name.
    pub id: String,
    /// [`crate::cache::CacheHeader::id`] of the caches.
    pub caches: u128,
    /// Their tokens.
    pub tokens: u64,
    /// Number of leading tokens whose latents the consumer has.
    pub have: u64,
    /// The consumer's window: maximum bytes in flight.
    pub window: u64,
    /// Whether the producer has accepted it before: the transfer continues, or no longer exists.
    pub accepted: bool,
}

/// A frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Consumer, first: proof of the secret, the pool of this connection, and the consumer's identity.
    Prove {
        /// HMAC of both nonces and the identity.
        proof: Proof,
        /// A random number of the consumer, the same for all its connections to this producer.
        pool: u128,
        /// The consumer's identity.
        identity: Identity,
    },
    /// Producer, second: proof and identity. After it either side sends any other frame.
    Welcome {
        /// HMAC of both nonces and the identity.
        proof: Proof,
        /// The producer's identity.
        identity: Identity,
    },
    /// Refuses a transfer, or the connection (transfer 0), which is closed after it.
    Refused {
        /// The reason as a number.
        refusal: Refusal,
        /// The reason as text.
        sentence: String,
    },
    /// Heartbeat.
    Ping,
    /// Consumer: requests a transfer, and repeats the request after a connection was lost.
    Fetch(Fetch),
    /// Producer: accepts a transfer; records follow.
    Accepted,
    /// Producer: a record.
    Record {
        /// Its number in the transfer, from 0 on.
        sequence: u64,
        /// The record.
        record: Arc<LayerRecord>,
    },
    /// Producer: what the receiving engine needs to continue, once the first tokens are sampled.
    HandOff {
        /// Number of records of the transfer.
        records: u64,
        /// The hand-off, in the engines' own format.
        bytes: Bytes,
    },
    /// Consumer: its engine has taken a record. Sent over the connection that the record came by.
    Ack {
        /// The record's number.
        sequence: u64,
    },
    /// Consumer: it has all records and the hand-off. Sent over the connection that the hand-off came by.
    Complete,
    /// Either side: cancels the transfer.
    Cancel {
        /// The reason as text.
        reason: String,
    },
    /// Between the ranks of one model: a call or its answer; the transfer is its number.
    Message {
        /// The message, in the ranks' own format.
        bytes: Bytes,
    },
}

impl Frame {
    /// The kind of the frame.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Prove { .. } => Kind::Prove,
            Self::Welcome { .. } => Kind::Welcome,
            Self::Refused { .. } => Kind::Refused,
            Self::Ping => Kind::Ping,
            Self::Fetch(_) => Kind::Fetch,
            Self::Accepted => Kind::Accepted,
            Self::Record { .. } => Kind::Record,
            Self::HandOff { .. } => Kind::HandOff,
            Self::Ack { .. } => Kind::Ack,
            Self::Complete => Kind::Complete,
            Self::Cancel { .. } => Kind::Cancel,
            Self::Message { .. } => Kind::Message,
        }
    }

    /// The body, which is sent after the head without a copy.
    #[must_use]
    pub fn body(&self) -> &[u8] {
        match self {
            Self::Record { record, .. } => &record.bytes,
            Self::HandOff { bytes, .. } | Self::Message { bytes } => bytes,
            _ => &[],
        }
    }

    /// Encodes header and head.
    #[must_use]
    pub fn encode(&self, transfer: u32) -> Vec<u8> {
        let mut bytes = vec![0; HEADER];
        self.put_head(&mut bytes);
        let mut header = Header {
            kind: self.kind(),
            transfer,
            head: bytes.len() - HEADER,
            body: self.body().len(),
            checksum: 0,
        };
        header.checksum = header.sum(&bytes[HEADER..]);
        bytes[..HEADER].copy_from_slice(&header.bytes());
        bytes
    }

    fn put_head(&self, head: &mut Vec<u8>) {
        match self {
            Self::Prove {
                proof,
                pool,
                identity,
            } => {
                head.put_slice(proof);
                head.put_u128_le(*pool);
                put_identity(head, identity);
            }
            Self::Welcome { proof, identity } => {
                head.put_slice(proof);
                put_identity(head, identity);
            }
            Self::Refused { refusal, sentence } => {
                head.put_u16_le(refusal.code());
                put_text(head, sentence, MAX_SENTENCE);
            }
            Self::Fetch(fetch) => {
                head.put_u128_le(fetch.caches);
                head.put_u64_le(fetch.tokens);
                head.put_u64_le(fetch.have);
                head.put_u64_le(fetch.window);
                head.put_u8(fetch.accepted.into());
                put_text(head, &fetch.id, MAX_ID);
            }
            Self::Record { sequence, record } => {
                head.put_u64_le(*sequence);
                record_head::put(head, record);
            }
            Self::HandOff { records, bytes } => {
                head.put_u64_le(*records);
                head.put_u64_le(xxh3_64(bytes));
            }
            Self::Message { bytes } => head.put_u64_le(xxh3_64(bytes)),
            Self::Ack { sequence } => head.put_u64_le(*sequence),
            Self::Cancel { reason } => put_text(head, reason, MAX_SENTENCE),
            Self::Ping | Self::Accepted | Self::Complete => {}
        }
    }

    /// Decodes a frame from a header that was checked against the head.
    ///
    /// # Errors
    /// A head that is too short or too long, or has an invalid value; a hand-off that is damaged. A record's own checksum is
    /// checked by [`LayerRecord::check`].
    pub fn decode(header: &Header, head: &[u8], body: Vec<u8>) -> Result<Self, TransferError> {
        let mut fields = Fields::new(head);
        let frame = match header.kind {
            Kind::Prove => Self::Prove {
                proof: fields.array("proof")?,
                pool: fields.u128("pool")?,
                identity: identity(&mut fields)?,
            },
            Kind::Welcome => Self::Welcome {
                proof: fields.array("proof")?,
                identity: identity(&mut fields)?,
            },
            Kind::Refused => Self::Refused {
                refusal: refusal(&mut fields)?,
                sentence: fields.text("sentence", MAX_SENTENCE)?,
            },
            Kind::Ping => Self::Ping,
            Kind::Fetch => Self::Fetch(Fetch {
                caches: fields.u128("caches")?,
                tokens: fields.u64("tokens")?,
                have: fields.u64("have")?,
                window: fields.u64("window")?,
                accepted: fields.flag("accepted")?,
                id: fields.text("transfer_id", MAX_ID)?,
            }),
            Kind::Accepted => Self::Accepted,
            Kind::Record => {
                let (sequence, mut record) = record_head::take(&mut fields, body.len())?;
                record.bytes = body;
                let record = Arc::new(record);
                Self::Record { sequence, record }
            }
            Kind::HandOff => {
                let records = fields.u64("records")?;
                let bytes = checked(&mut fields, "hand-off's checksum", body)?;
                Self::HandOff { records, bytes }
            }
            Kind::Message => Self::Message {
                bytes: checked(&mut fields, "message's checksum", body)?,
            },
            Kind::Ack => Self::Ack {
                sequence: fields.u64("sequence")?,
            },
            Kind::Complete => Self::Complete,
            Kind::Cancel => Self::Cancel {
                reason: fields.text("reason", MAX_SENTENCE)?,
            },
        };
        fields.end()?;
        Ok(frame)
    }
}

fn put_identity(head: &mut Vec<u8>, identity: &Identity) {
    let fields = identity.fields();
    head.put_u16_le(fields.len() as u16);
    for (name, value) in fields {
        put_text(head, name, MAX_ID);
        put_text(head, value, MAX_ID);
    }
}

fn identity(fields: &mut Fields<'_>) -> Result<Identity, TransferError> {
    let count = usize::from(fields.u16("properties")?);
    if count > MAX_FIELDS {
        let expected = format!("at most {MAX_FIELDS}");
        return Err(TransferError::frame("properties", expected, count));
    }
    let mut all = BTreeMap::new();
    for _ in 0..count {
        let name = fields.text("name of a property", MAX_ID)?;
        all.insert(name, fields.text("value of a property", MAX_ID)?);
    }
    Ok(Identity::received(all))
}

fn refusal(fields: &mut Fields<'_>) -> Result<Refusal, TransferError> {
    let code = fields.u16("refusal")?;
    Refusal::from_code(code)
        .ok_or_else(|| TransferError::frame("refusal", "a number from 1 to 10", code))
}

/// A body, checked against the checksum in the head.
fn checked(
    fields: &mut Fields<'_>,
    what: &'static str,
    body: Vec<u8>,
) -> Result<Bytes, TransferError> {
    let (expected, found) = (fields.u64("checksum")?, xxh3_64(&body));
    if found != expected {
        let hex = |sum: u64| format!("{sum:016x}");
        return Err(TransferError::frame(what, hex(expected), hex(found)));
    }
    Ok(Bytes::from(body))
}
