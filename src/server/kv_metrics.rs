//! Prometheus metrics of cache transfers: series for each role of the server.

use metrics::{Counter, Gauge};

use super::metrics::Maker;
use crate::transfer::TransferStats;

/// The series of one role.
struct Role {
    payload: [Counter; 2],
    framing: [Counter; 2],
    records: [Counter; 2],
    rate: Gauge,
    resent: Counter,
    stalled: [Gauge; 2],
    retransmissions: Counter,
    held: Gauge,
    connections: Gauge,
    lost: Counter,
    refused: Counter,
    transfers: [Gauge; 2],
    ended: [Counter; 4],
}

/// All series of transfers.
pub(super) struct KvMetrics {
    roles: Vec<Role>,
    recomputed: Counter,
}

impl KvMetrics {
    /// All series at zero, for these roles.
    pub(super) fn new(make: &Maker, roles: &[&'static str]) -> Self {
        Self {
            roles: roles.iter().map(|role| Role::new(make, role)).collect(),
            recomputed: make.counter(
                "kimi_linear:kv_transfer_recomputed_total",
                "Prompts that were read here because their caches did not come.",
                None,
            ),
        }
    }

    /// Updates the series from counters, in the order of the roles.
    pub(super) fn set(&self, stats: &[(&'static str, TransferStats)], recomputed: u64) {
        for (role, (_, stats)) in self.roles.iter().zip(stats) {
            role.set(stats);
        }
        self.recomputed.absolute(recomputed);
    }
}

impl Role {
    fn new(make: &Maker, role: &'static str) -> Self {
        let labels =
            |label: Option<(&'static str, &'static str)>| [("role", role)].into_iter().chain(label);
        let counter = |name, what, label| make.counter(name, what, labels(label));
        let gauge = |name, what, label| make.gauge(name, what, labels(label));
        let both = |name, what| {
            ["sent", "received"].map(|way| counter(name, what, Some(("direction", way))))
        };
        Self {
            payload: both(
                "kimi_linear:kv_transfer_bytes_total",
                "Bytes of caches and hand-offs, those sent again included.",
            ),
            framing: both(
                "kimi_linear:kv_transfer_framing_bytes_total",
                "Bytes around them: headers of frames, and frames without caches.",
            ),
            records: both(
                "kimi_linear:kv_transfer_records_total",
                "Records of caches that engines gave or took.",
            ),
            rate: gauge(
                "kimi_linear:kv_transfer_bytes_per_second",
                "Bytes of caches a second, both ways, of late.",
                None,
            ),
            resent: counter(
                "kimi_linear:kv_transfer_resent_total",
                "Records and hand-offs sent again because their connection was lost.",
                None,
            ),
            stalled: ["window", "socket"].map(|cause| {
                gauge(
                    "kimi_linear:kv_transfer_stalled_seconds",
                    "Seconds so far that something to send waited for the receiver's window, or for a socket.",
                    Some(("cause", cause)),
                )
            }),
            retransmissions: counter(
                "kimi_linear:kv_transfer_tcp_retransmissions_total",
                "TCP segments sent again, where the system tells.",
                None,
            ),
            held: gauge(
                "kimi_linear:kv_transfer_held_bytes",
                "Bytes on their way between two engines.",
                None,
            ),
            connections: gauge(
                "kimi_linear:kv_transfer_connections",
                "Connections past their handshake.",
                None,
            ),
            lost: counter(
                "kimi_linear:kv_transfer_connections_lost_total",
                "Connections that were lost.",
                None,
            ),
            refused: counter(
                "kimi_linear:kv_transfer_connections_refused_total",
                "Connections refused in their handshake.",
                None,
            ),
            transfers: ["waiting", "active"].map(|state| {
                gauge(
                    "kimi_linear:kv_transfers",
                    "Transfers that wait for the other side, and that are under way.",
                    Some(("state", state)),
                )
            }),
            ended: ["completed", "cancelled", "expired", "failed"].map(|outcome| {
                counter(
                    "kimi_linear:kv_transfers_total",
                    "Transfers that have ended, by how.",
                    Some(("outcome", outcome)),
                )
            }),
        }
    }

    fn set(&self, stats: &TransferStats) {
        let both = |counters: &[Counter; 2], counts: [u64; 2]| {
            for (counter, count) in counters.iter().zip(counts) {
                counter.absolute(count);
            }
        };
        both(&self.payload, [stats.payload_sent, stats.payload_received]);
        both(&self.framing, [stats.framing_sent, stats.framing_received]);
        both(&self.records, [stats.records_sent, stats.records_received]);
        self.rate.set(stats.rate);
        self.resent.absolute(stats.resent);
        let stalled = [stats.stalled_for_window, stats.stalled_for_socket];
        for (gauge, time) in self.stalled.iter().zip(stalled) {
            gauge.set(time.as_secs_f64());
        }
        self.retransmissions.absolute(stats.tcp_retransmissions);
        self.held.set(stats.held_bytes as f64);
        self.connections.set(stats.connections as f64);
        self.lost.absolute(stats.connections_lost);
        self.refused.absolute(stats.connections_refused);
        for (gauge, count) in self.transfers.iter().zip([stats.waiting, stats.active]) {
            gauge.set(count as f64);
        }
        let ended = [
            stats.completed,
            stats.cancelled,
            stats.expired,
            stats.failed,
        ];
        for (counter, count) in self.ended.iter().zip(ended) {
            counter.absolute(count);
        }
    }
}
