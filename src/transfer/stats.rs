//! Counters of transfers.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Minimum time over which a rate is computed.
const RATE_SPAN: Duration = Duration::from_secs(1);

/// Counters of a producer or a consumer since it was created. In Prometheus terms, fields marked as gauges are gauges, and
/// all others are counters.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct TransferStats {
    /// Bytes of records and hand-offs sent, including those sent again.
    pub payload_sent: u64,
    /// Bytes of records and hand-offs received.
    pub payload_received: u64,
    /// Bytes of headers and heads sent, and of all other frames.
    pub framing_sent: u64,
    /// Bytes of headers and heads received, and of all other frames.
    pub framing_received: u64,
    /// Payload bytes per second in both directions, over the last second or more. Gauge.
    pub rate: f64,
    /// Records taken from sending engines.
    pub records_sent: u64,
    /// Records passed to receiving engines.
    pub records_received: u64,
    /// Records and hand-offs that were sent again because their connection was lost.
    pub resent: u64,
    /// Time that transfers with further records waited because the window was full.
    pub stalled_for_window: Duration,
    /// Time that connections with data to send waited because the socket accepted none.
    pub stalled_for_socket: Duration,
    /// TCP segments sent again, from `TCP_INFO`; 0 on systems without it (all but Linux).
    pub tcp_retransmissions: u64,
    /// Bytes taken from sending engines, or received, that no receiving engine has taken yet. Gauge.
    pub held_bytes: u64,
    /// Connections after their handshake. Gauge.
    pub connections: u64,
    /// Connections that were lost.
    pub connections_lost: u64,
    /// Connections refused in their handshake.
    pub connections_refused: u64,
    /// Transfers offered and not fetched, or fetched and not offered. Gauge.
    pub waiting: u64,
    /// Active transfers. Gauge.
    pub active: u64,
    /// Completed transfers.
    pub completed: u64,
    /// Transfers that either side cancelled.
    pub cancelled: u64,
    /// Transfers that expired: offered and not fetched in time.
    pub expired: u64,
    /// Transfers that failed, with their request or because a peer was lost.
    pub failed: u64,
}

/// How a transfer ended.
#[derive(Clone, Copy)]
pub(super) enum Ended {
    Completed,
    Cancelled,
    Expired,
    Failed,
}

#[derive(Default)]
pub(super) struct Counters {
    payload_sent: AtomicU64,
    payload_received: AtomicU64,
    framing_sent: AtomicU64,
    framing_received: AtomicU64,
    pub(super) records: AtomicU64,
    pub(super) resent: AtomicU64,
    window_micros: AtomicU64,
    socket_micros: AtomicU64,
    pub(super) retransmissions: AtomicU64,
    pub(super) connections: AtomicU64,
    pub(super) lost: AtomicU64,
    pub(super) refused: AtomicU64,
    ended: [AtomicU64; 4],
    rate: Mutex<Rate>,
}

#[derive(Default)]
struct Rate {
    /// The start of the span, and the payload until then.
    since: Option<(Instant, u64)>,
    last: f64,
}

impl Counters {
    pub(super) fn sent(&self, framing: usize, payload: usize) {
        self.framing_sent.fetch_add(framing as u64, Relaxed);
        self.payload_sent.fetch_add(payload as u64, Relaxed);
    }

    pub(super) fn received(&self, framing: usize, payload: usize) {
        self.framing_received.fetch_add(framing as u64, Relaxed);
        self.payload_received.fetch_add(payload as u64, Relaxed);
    }

    pub(super) fn stalled_for_window(&self, time: Duration) {
        self.window_micros
            .fetch_add(time.as_micros() as u64, Relaxed);
    }

    pub(super) fn stalled_for_socket(&self, time: Duration) {
        self.socket_micros
            .fetch_add(time.as_micros() as u64, Relaxed);
    }

    /// Records taken from sending engines, or passed to receiving ones.
    pub(super) fn records(&self) -> u64 {
        self.records.load(Relaxed)
    }

    pub(super) fn ended(&self, how: Ended) {
        self.ended[how as usize].fetch_add(1, Relaxed);
    }

    /// Ends the span of the rate if it is long enough.
    fn rate(&self, payload: u64) -> f64 {
        let now = Instant::now();
        let mut rate = super::locked(&self.rate);
        match rate.since {
            None => rate.since = Some((now, payload)),
            Some((since, before)) if now - since >= RATE_SPAN => {
                rate.last = (payload - before) as f64 / (now - since).as_secs_f64();
                rate.since = Some((now, payload));
            }
            Some(_) => {}
        }
        rate.last
    }

    /// The counters; the caller adds the gauges of transfers.
    pub(super) fn snapshot(&self) -> TransferStats {
        let load = |counter: &AtomicU64| counter.load(Relaxed);
        let (sent, received) = (load(&self.payload_sent), load(&self.payload_received));
        let ended = |how: Ended| load(&self.ended[how as usize]);
        TransferStats {
            payload_sent: sent,
            payload_received: received,
            framing_sent: load(&self.framing_sent),
            framing_received: load(&self.framing_received),
            rate: self.rate(sent + received),
            resent: load(&self.resent),
            stalled_for_window: Duration::from_micros(load(&self.window_micros)),
            stalled_for_socket: Duration::from_micros(load(&self.socket_micros)),
            tcp_retransmissions: load(&self.retransmissions),
            connections: load(&self.connections),
            connections_lost: load(&self.lost),
            connections_refused: load(&self.refused),
            completed: ended(Ended::Completed),
            cancelled: ended(Ended::Cancelled),
            expired: ended(Ended::Expired),
            failed: ended(Ended::Failed),
            ..TransferStats::default()
        }
    }
}
