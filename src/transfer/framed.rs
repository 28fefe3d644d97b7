//! Frames over a socket: reading and writing, with limits of time and memory.

use std::future::poll_fn;
use std::io::{ErrorKind, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::BufMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::time::timeout;
use xxhash_rust::xxh3::Xxh3;

use super::frame::{Frame, HEADER, Header, Kind, OPENING};
use super::record_head;
use super::stats::Counters;
use crate::error::TransferError;

/// Bytes of a body that are read and hashed together: few enough to be hashed where reading has left them, in a core's own cache.
const PIECE: usize = 256 << 10;

/// Bytes read ahead: several small frames, or the beginning of a large one.
const BUFFER: usize = 16 << 10;

/// How long a peer may take to read the last frame of a connection.
const LAST_FRAME: Duration = Duration::from_secs(1);

type Read = Box<dyn AsyncRead + Send + Unpin>;
type Write = Box<dyn AsyncWrite + Send + Unpin>;

/// The reading half of a connection.
pub(super) struct FrameReader {
    inner: BufReader<Read>,
    max_body: usize,
    /// Maximum time to wait for each byte.
    patience: Duration,
    counters: Arc<Counters>,
}

impl FrameReader {
    pub(super) fn new(inner: Read, patience: Duration, counters: Arc<Counters>) -> Self {
        Self {
            inner: BufReader::with_capacity(BUFFER, inner),
            max_body: 0,
            patience,
            counters,
        }
    }

    /// Sets the maximum size of a body from now on.
    pub(super) fn allow_bodies(&mut self, max_body: usize) {
        self.max_body = max_body;
    }

    /// Reads the other side's opening bytes.
    pub(super) async fn opening(&mut self) -> Result<[u8; OPENING], TransferError> {
        let mut bytes = [0; OPENING];
        self.fill(&mut bytes).await?;
        Ok(bytes)
    }

    /// The next frame, and its transfer.
    pub(super) async fn next(&mut self) -> Result<Received, TransferError> {
        let mut header = [0; HEADER];
        self.fill(&mut header).await?;
        let header = Header::parse(&header, self.max_body)?;
        let mut head = vec![0; header.head];
        self.fill(&mut head).await?;
        header.check(&head)?;
        let mut hash = match header.kind {
            Kind::Record => Some(record_head::hasher(&head, header.body)?),
            _ => None,
        };
        let body = self.body(header.body, hash.as_mut()).await?;
        self.counters.received(HEADER + header.head, header.body);
        Ok(Received {
            transfer: header.transfer,
            frame: Frame::decode(&header, &head, body)?,
            hash: hash.map(|hash| hash.digest()),
        })
    }

    async fn fill(&mut self, bytes: &mut [u8]) -> Result<(), TransferError> {
        let mut at = 0;
        while at < bytes.len() {
            let read = timeout(self.patience, self.inner.read(&mut bytes[at..])).await;
            at += read_bytes(read, self.patience)?;
        }
        Ok(())
    }

    /// A body, read to where it stays.
    async fn body(
        &mut self,
        length: usize,
        mut hash: Option<&mut Xxh3>,
    ) -> Result<Vec<u8>, TransferError> {
        let mut body = Vec::new();
        let reserved = body.try_reserve_exact(length);
        reserved.map_err(|error| TransferError::frame("body", "what memory holds", error))?;
        let mut rest = (&mut self.inner).take(length as u64);
        while rest.limit() > 0 {
            let mut piece = (&mut body).limit(PIECE);
            let read = timeout(self.patience, rest.read_buf(&mut piece)).await;
            let read = read_bytes(read, self.patience)?;
            if let Some(hash) = &mut hash {
                hash.update(&body[body.len() - read..]);
            }
        }
        Ok(body)
    }
}

/// A frame that came.
pub(super) struct Received {
    pub(super) transfer: u32,
    pub(super) frame: Frame,
    /// Of a record: the hash of what came, to be held against its checksum ([`crate::cache::LayerRecord::check`]).
    pub(super) hash: Option<u64>,
}

/// How many bytes came of a read.
fn read_bytes(
    read: Result<std::io::Result<usize>, tokio::time::error::Elapsed>,
    limit: Duration,
) -> Result<usize, TransferError> {
    let what = "waiting for a byte of the peer";
    let read = read.map_err(|_| TransferError::Timeout { what, limit })?;
    match read {
        Ok(0) => Err(std::io::Error::from(ErrorKind::UnexpectedEof)),
        other => other,
    }
    .map_err(|error| TransferError::io("reading", error))
}

/// The writing half of a connection.
pub(super) struct FrameWriter {
    inner: Write,
    patience: Duration,
    /// Whether a frame has been written in part: no other frame may follow then.
    within: bool,
    counters: Arc<Counters>,
}

impl FrameWriter {
    pub(super) fn new(inner: Write, patience: Duration, counters: Arc<Counters>) -> Self {
        Self {
            inner,
            patience,
            within: false,
            counters,
        }
    }

    pub(super) async fn opening(&mut self, bytes: &[u8; OPENING]) -> Result<(), TransferError> {
        self.all(bytes, &[]).await
    }

    /// Writes a frame; its body is not copied.
    pub(super) async fn write(
        &mut self,
        transfer: u32,
        frame: &Frame,
    ) -> Result<(), TransferError> {
        let (head, body) = (frame.encode(transfer), frame.body());
        self.all(&head, body).await?;
        self.counters.sent(head.len(), body.len());
        Ok(())
    }

    /// Writes a last frame, unless another is written in part, and closes this direction of the connection. With the other
    /// direction's `reader` it waits at most a second until the peer has closed that: a socket that is closed with unread
    /// bytes is reset, and the last frame would be lost with it.
    pub(super) async fn close(mut self, reader: Option<FrameReader>, last: Option<(u32, Frame)>) {
        let limit = self.patience.min(LAST_FRAME);
        let end = async {
            if !self.within
                && let Some((transfer, frame)) = last
            {
                self.write(transfer, &frame).await?;
            }
            let shutdown = self.inner.shutdown().await;
            shutdown.map_err(|error| TransferError::io("closing", error))?;
            if let Some(mut reader) = reader {
                let rest = tokio::io::copy_buf(&mut reader.inner, &mut tokio::io::sink()).await;
                rest.map_err(|error| TransferError::io("closing", error))?;
            }
            Ok::<(), TransferError>(())
        };
        match timeout(limit, end).await {
            Ok(Ok(())) => {}
            // The peer has closed the connection, which is why it ends.
            Ok(Err(error)) => tracing::debug!("{error}"),
            Err(_) => tracing::debug!("the peer did not close its side of a connection in time"),
        }
    }

    async fn all(&mut self, head: &[u8], body: &[u8]) -> Result<(), TransferError> {
        self.within = true;
        let mut parts = [IoSlice::new(head), IoSlice::new(body)];
        let mut parts = &mut parts[..];
        IoSlice::advance_slices(&mut parts, 0);
        while !parts.is_empty() {
            let written = self.some(parts).await?;
            IoSlice::advance_slices(&mut parts, written);
        }
        let flushed = timeout(self.patience, self.inner.flush()).await;
        let limit = self.patience;
        let what = "sending to the peer";
        let flushed = flushed.map_err(|_| TransferError::Timeout { what, limit })?;
        flushed.map_err(|error| TransferError::io("writing", error))?;
        self.within = false;
        Ok(())
    }

    /// Writes as much as the socket accepts, and counts the time during which it accepted none.
    async fn some(&mut self, parts: &[IoSlice<'_>]) -> Result<usize, TransferError> {
        let mut since = None;
        let inner = &mut self.inner;
        let write = poll_fn(|context| {
            let poll = Pin::new(&mut *inner).poll_write_vectored(context, parts);
            if poll.is_pending() {
                since.get_or_insert_with(Instant::now);
            }
            match poll {
                Poll::Ready(Ok(0)) => Poll::Ready(Err(ErrorKind::WriteZero.into())),
                poll => poll,
            }
        });
        let written = timeout(self.patience, write).await;
        if let Some(since) = since {
            self.counters.stalled_for_socket(since.elapsed());
        }
        let limit = self.patience;
        let what = "sending to the peer";
        let written = written.map_err(|_| TransferError::Timeout { what, limit })?;
        written.map_err(|error| TransferError::io("writing", error))
    }
}
