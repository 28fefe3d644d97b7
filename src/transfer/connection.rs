//! A connection after its handshake, the same on both sides: frames in, frames out, heartbeats.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tokio::time::{MissedTickBehavior, interval, sleep};

use super::frame::Frame;
use super::framed::{FrameReader, FrameWriter, Received};
use super::handshake::{Link, refused};
use super::stats::Counters;
use super::tcp_info::TcpInfo;
use crate::error::{Refusal, TransferError};

/// Frames of a transfer that must be sent over one particular connection.
pub(super) type Outbox = UnboundedSender<(u32, Frame)>;

/// The source of frames that any connection may send.
pub(super) trait Items: Send {
    /// The next frame. Dropping the future loses none.
    fn next(&self) -> impl Future<Output = (u32, Frame)> + Send;
}

/// No such frames, on a consumer.
pub(super) struct NoItems;

impl Items for NoItems {
    async fn next(&self) -> (u32, Frame) {
        std::future::pending().await
    }
}

/// Runs a connection to its end: until the peer or the network closes it, a frame is invalid, or the outbox is closed and
/// empty (`None`).
pub(super) async fn run(
    link: Link,
    outbox: UnboundedReceiver<(u32, Frame)>,
    items: impl Items,
    heartbeat: Duration,
    counters: Arc<Counters>,
    take: impl FnMut(Received) -> Result<(), TransferError> + Send,
) -> Option<TransferError> {
    let Link {
        mut reader,
        mut writer,
        tcp,
    } = link;
    counters.connections.fetch_add(1, Relaxed);
    let mut sampler = Sampler {
        tcp,
        last: 0,
        counters: Arc::clone(&counters),
    };
    let end = tokio::select! {
        error = read(&mut reader, take) => Some(error),
        end = write(&mut writer, outbox, items, heartbeat) => end.err(),
        () = sampler.run(heartbeat) => None,
    };
    sampler.sample();
    counters.connections.fetch_sub(1, Relaxed);
    // A peer that sent an invalid frame is told so; one that refused knows.
    let last = end.as_ref().filter(|error| {
        !matches!(error, TransferError::Refused { .. }) && error.refusal() == Refusal::Protocol
    });
    // If this side ends the connection, the peer must be able to read its last frame.
    let reader = (end.is_none() || last.is_some()).then_some(reader);
    writer
        .close(reader, last.map(|error| (0, refused(error))))
        .await;
    end
}

async fn read(
    reader: &mut FrameReader,
    mut take: impl FnMut(Received) -> Result<(), TransferError>,
) -> TransferError {
    loop {
        let received = match reader.next().await {
            Ok(received) => received,
            Err(error) => return error,
        };
        let taken = match received.frame {
            Frame::Ping => Ok(()),
            Frame::Refused { refusal, sentence } if received.transfer == 0 => {
                Err(TransferError::Refused { refusal, sentence })
            }
            _ => take(received),
        };
        if let Err(error) = taken {
            return error;
        }
    }
}

async fn write(
    writer: &mut FrameWriter,
    mut outbox: UnboundedReceiver<(u32, Frame)>,
    items: impl Items,
    heartbeat: Duration,
) -> Result<(), TransferError> {
    loop {
        let (transfer, frame) = tokio::select! {
            biased;
            frame = outbox.recv() => match frame {
                Some(frame) => frame,
                None => return Ok(()),
            },
            item = items.next() => item,
            () = sleep(heartbeat) => (0, Frame::Ping),
        };
        writer.write(transfer, &frame).await?;
    }
}

/// Regularly reads the number of retransmitted segments from the system.
struct Sampler {
    tcp: Option<TcpInfo>,
    last: u64,
    counters: Arc<Counters>,
}

impl Sampler {
    async fn run(&mut self, every: Duration) {
        let mut ticks = interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.sample();
        }
    }

    fn sample(&mut self) {
        let Some(all) = self.tcp.as_ref().and_then(TcpInfo::retransmissions) else {
            return;
        };
        let more = all.saturating_sub(self.last);
        self.counters.retransmissions.fetch_add(more, Relaxed);
        self.last = all;
    }
}
