//! The start of a connection: TLS if it is configured, versions, proofs of the shared secret, and the identity of each side.
//!
//! This side reveals only its version before the peer has proved that it knows the secret.

use std::sync::Arc;

use ring::hmac;
use ring::rand::{SecureRandom, SystemRandom};
use tokio::io::{AsyncRead, AsyncWrite, split};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::frame::{self, Frame, Nonce, Proof, VERSION};
use super::framed::{FrameReader, FrameWriter};
use super::identity::Identity;
use super::options::TransferOptions;
use super::stats::Counters;
use super::tcp_info::TcpInfo;
use crate::error::TransferError;

/// Bytes exported from TLS's key, which the proofs are bound to, so that they are of no use on another connection.
type Binding = [u8; 32];
const BINDING_LABEL: &[u8] = b"EXPORTER-kimi-linear-transfer";

/// A connection after its handshake.
pub(super) struct Link {
    pub(super) reader: FrameReader,
    pub(super) writer: FrameWriter,
    pub(super) tcp: Option<TcpInfo>,
}

/// One side's inputs to handshakes.
pub(super) struct Local {
    pub(super) identity: Identity,
    pub(super) options: TransferOptions,
    pub(super) counters: Arc<Counters>,
}

/// Random bytes from the system.
pub(super) fn random<const N: usize>() -> Result<[u8; N], TransferError> {
    let mut bytes = [0; N];
    let filled = SystemRandom::new().fill(&mut bytes);
    filled.map_err(|error| {
        TransferError::io(
            "drawing random numbers",
            std::io::Error::other(error.to_string()),
        )
    })?;
    Ok(bytes)
}

/// The data that the proofs of one connection cover.
struct Transcript {
    consumer: Nonce,
    producer: Nonce,
    binding: Binding,
}

impl Transcript {
    /// The bytes that one side proves: they begin with its role, so that a proof cannot be sent back.
    fn message(&self, role: &[u8], pool: u128, identity: &Identity) -> Vec<u8> {
        let mut message = role.to_vec();
        for part in [&self.consumer, &self.producer, &self.binding] {
            message.extend_from_slice(part);
        }
        message.extend_from_slice(&pool.to_le_bytes());
        for (name, value) in identity.fields() {
            for text in [name, value] {
                message.extend_from_slice(&(text.len() as u64).to_le_bytes());
                message.extend_from_slice(text.as_bytes());
            }
        }
        message
    }

    fn prove(&self, key: &hmac::Key, role: &[u8], pool: u128, identity: &Identity) -> Proof {
        let tag = hmac::sign(key, &self.message(role, pool, identity));
        let mut proof = [0; 32];
        proof.copy_from_slice(tag.as_ref());
        proof
    }

    /// Checks the other side's proof in constant time.
    fn check(
        &self,
        key: &hmac::Key,
        role: &[u8],
        pool: u128,
        identity: &Identity,
        proof: &Proof,
    ) -> Result<(), TransferError> {
        let message = self.message(role, pool, identity);
        hmac::verify(key, &message, proof).map_err(|_| TransferError::Secret)
    }
}

const CONSUMER: &[u8] = b"kimi-linear transfer consumer";
const PRODUCER: &[u8] = b"kimi-linear transfer producer";

fn halves<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
    stream: S,
    local: &Local,
) -> (FrameReader, FrameWriter) {
    let (read, write) = split(stream);
    framed(Box::new(read), Box::new(write), local)
}

fn framed(
    read: Box<dyn AsyncRead + Send + Unpin>,
    write: Box<dyn AsyncWrite + Send + Unpin>,
    local: &Local,
) -> (FrameReader, FrameWriter) {
    let patience = local.options.dead_after;
    let counters = || Arc::clone(&local.counters);
    (
        FrameReader::new(read, patience, counters()),
        FrameWriter::new(write, patience, counters()),
    )
}

fn exporter<T>(connection: &rustls::ConnectionCommon<T>) -> Result<Binding, TransferError> {
    let exported = connection.export_keying_material([0; 32], BINDING_LABEL, None);
    exported.map_err(|error| TransferError::Tls {
        what: error.to_string(),
    })
}

/// A socket that sends without delay.
fn prepare(socket: &TcpStream) -> Result<Option<TcpInfo>, TransferError> {
    let set = socket.set_nodelay(true);
    set.map_err(|error| TransferError::io("setting TCP_NODELAY", error))?;
    Ok(TcpInfo::of(socket))
}

/// Opens a connection to the producer at `address`, as part of the pool with this number.
pub(super) async fn connect(
    address: &str,
    pool: u128,
    local: &Local,
) -> Result<Link, TransferError> {
    let limit = local.options.handshake_timeout;
    let what = "connecting to the producer and the handshake";
    let link = timeout(limit, connect_unlimited(address, pool, local)).await;
    link.map_err(|_| TransferError::Timeout { what, limit })?
}

async fn connect_unlimited(
    address: &str,
    pool: u128,
    local: &Local,
) -> Result<Link, TransferError> {
    let socket = TcpStream::connect(address).await;
    let socket = socket.map_err(|source| TransferError::Connect {
        address: address.to_owned(),
        source: Arc::new(source),
    })?;
    let tcp = prepare(&socket)?;
    let (binding, (mut reader, mut writer)) = match &local.options.tls {
        None => {
            let (read, write) = socket.into_split();
            ([0; 32], framed(Box::new(read), Box::new(write), local))
        }
        Some(tls) => {
            let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
            let (connector, name) = tls.connector(host)?;
            let stream = connector.connect(name, socket).await;
            let stream = stream.map_err(|error| TransferError::Tls {
                what: format!("handshake with {address}: {error}"),
            })?;
            (exporter(stream.get_ref().1)?, halves(stream, local))
        }
    };
    let nonce = random()?;
    writer.opening(&frame::opening(VERSION, &nonce)).await?;
    let transcript = Transcript {
        consumer: nonce,
        producer: frame::parse_opening(&reader.opening().await?)?,
        binding,
    };
    let key = &local.options.secret.key;
    let identity = local.identity.clone();
    let proof = transcript.prove(key, CONSUMER, pool, &identity);
    let prove = Frame::Prove {
        proof,
        pool,
        identity,
    };
    // A producer that refuses before it reads this closes the connection, and its message is more useful than the error here.
    let written = writer.write(0, &prove).await;
    match reader.next().await?.frame {
        Frame::Welcome { proof, identity } => {
            written?;
            transcript.check(key, PRODUCER, pool, &identity, &proof)?;
            local.identity.check(&identity)?;
        }
        Frame::Refused { refusal, sentence } => {
            return Err(TransferError::Refused { refusal, sentence });
        }
        other => return Err(unexpected("welcome", &other)),
    }
    reader.allow_bodies(local.options.max_record_bytes);
    Ok(Link {
        reader,
        writer,
        tcp,
    })
}

/// The error for a frame that is not expected here.
pub(super) fn unexpected(expected: &'static str, found: &Frame) -> TransferError {
    TransferError::frame("kind", expected, format!("{:?}", found.kind()))
}

/// An accepted connection before its handshake.
pub(super) struct Taken {
    reader: FrameReader,
    writer: FrameWriter,
    binding: Binding,
    tcp: Option<TcpInfo>,
    /// Whether this side's opening bytes are sent, which precede any frame.
    opened: bool,
}

/// Performs the TLS handshake of an accepted connection.
pub(super) async fn take(socket: TcpStream, local: &Local) -> Result<Taken, TransferError> {
    let tcp = prepare(&socket)?;
    let (binding, (reader, writer)) = match &local.options.tls {
        None => {
            let (read, write) = socket.into_split();
            ([0; 32], framed(Box::new(read), Box::new(write), local))
        }
        Some(tls) => {
            let stream = tls.acceptor()?.accept(socket).await;
            let stream = stream.map_err(|error| TransferError::Tls {
                what: format!("handshake with a consumer: {error}"),
            })?;
            (exporter(stream.get_ref().1)?, halves(stream, local))
        }
    };
    Ok(Taken {
        reader,
        writer,
        binding,
        tcp,
        opened: false,
    })
}

impl Taken {
    async fn open(&mut self, nonce: &Nonce) -> Result<(), TransferError> {
        self.opened = true;
        self.writer.opening(&frame::opening(VERSION, nonce)).await
    }

    /// Performs the handshake; returns the number of the consumer's pool of connections. On an error, [`Taken::refuse`] tells
    /// the peer.
    pub(super) async fn authenticate(&mut self, local: &Local) -> Result<u128, TransferError> {
        let opening = self.reader.opening().await?;
        let nonce = random()?;
        self.open(&nonce).await?;
        let transcript = Transcript {
            consumer: frame::parse_opening(&opening)?,
            producer: nonce,
            binding: self.binding,
        };
        let key = &local.options.secret.key;
        let (pool, theirs) = match self.reader.next().await?.frame {
            Frame::Prove {
                proof,
                pool,
                identity,
            } => {
                transcript.check(key, CONSUMER, pool, &identity, &proof)?;
                (pool, identity)
            }
            other => return Err(unexpected("prove", &other)),
        };
        local.identity.check(&theirs)?;
        let identity = local.identity.clone();
        let proof = transcript.prove(key, PRODUCER, pool, &identity);
        let welcome = Frame::Welcome { proof, identity };
        self.writer.write(0, &welcome).await?;
        self.reader.allow_bodies(local.options.max_record_bytes);
        Ok(pool)
    }

    /// Sends the reason to the peer and closes: with `patiently` after a moment in which the peer can read it, otherwise at
    /// once.
    pub(super) async fn refuse(mut self, error: &TransferError, patiently: bool) {
        // A peer that did not accept the opening bytes does not accept a refusal either.
        if self.opened || self.open(&[0; 32]).await.is_ok() {
            let reader = patiently.then_some(self.reader);
            self.writer.close(reader, Some((0, refused(error)))).await;
        }
    }

    /// The connection, after the handshake.
    pub(super) fn link(self) -> Link {
        Link {
            reader: self.reader,
            writer: self.writer,
            tcp: self.tcp,
        }
    }
}

/// The error text that is sent to the peer.
pub(super) fn refused(error: &TransferError) -> Frame {
    Frame::Refused {
        refusal: error.refusal(),
        sentence: error.to_string(),
    }
}
