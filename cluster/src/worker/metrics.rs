//! What the worker tells Prometheus, with the names that a server of `kimi-linear serve` has, and Dynamo's router.

use std::fmt::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use dynamo_backend_common::{ComponentSnapshot, SnapshotPublisher};
use kimi_linear::engine::Status;
use kimi_linear::transfer::TransferStats;
use tokio::task::spawn_blocking;
use tokio_util::sync::CancellationToken;

use super::counts::{Counts, Totals};
use super::model::Model;
use super::parameters::{self, Sample};

/// The only data-parallel rank of a worker.
pub(super) const RANK: u32 = 0;

/// Interval at which the engine is asked for its status.
const INTERVAL: Duration = Duration::from_millis(250);

/// The engine's last known status, and that of a pair's parameters. Asking for it waits for a step to end, which a scrape should not.
#[derive(Default)]
pub(super) struct LastStatus(Mutex<(Status, Option<Sample>)>);

impl LastStatus {
    pub(super) fn get(&self) -> (Status, Option<Sample>) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn set(&self, status: Status, sample: Option<Sample>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = (status, sample);
    }
}

/// Where the router's load report goes, if this role has one.
pub(super) type Load = Arc<Mutex<Option<Arc<SnapshotPublisher>>>>;

/// Asks for the status until `stop` is cancelled. An engine that has stopped cancels `lost`.
pub(super) fn watch(
    model: Arc<Model>,
    last: Arc<LastStatus>,
    counts: Arc<Counts>,
    load: Load,
    stop: CancellationToken,
    lost: CancellationToken,
) {
    tokio::spawn(async move {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(INTERVAL) => {}
            }
            let asked = Arc::clone(&model);
            let sampled =
                spawn_blocking(move || Some((asked.engine.status().ok()?, asked.sample())));
            let Ok(Some((status, sample))) = sampled.await else {
                lost.cancel();
                return;
            };
            last.set(status, sample);
            let publisher = load.lock().unwrap_or_else(PoisonError::into_inner).clone();
            if let Some(publisher) = publisher {
                publisher.publish(RANK, snapshot(&status, counts.totals()));
            }
        }
    });
}

/// Dynamo's form of the load.
fn snapshot(status: &Status, totals: Totals) -> ComponentSnapshot {
    let pools = &status.occupancy;
    // Blocks that only cached prefixes hold are there for the next request.
    let used = pools.blocks.saturating_sub(pools.idle_blocks);
    let hits = totals.cached_tokens as f32 / totals.prompt_tokens as f32;
    ComponentSnapshot {
        kv_used_blocks: used as u64,
        kv_total_blocks: pools.all_blocks as u64,
        gpu_cache_usage: used as f32 / pools.all_blocks.max(1) as f32,
        kv_cache_hit_rate: (totals.prompt_tokens > 0).then_some(hits),
        dp_rank: RANK,
    }
}

/// All that is told of a worker.
pub(super) struct Report<'a> {
    pub(super) model: &'a str,
    pub(super) status: Status,
    pub(super) totals: Totals,
    /// Seconds to prefill a token, if they are known.
    pub(super) seconds_per_token: Option<f64>,
    /// By role of transfers, and the number of prompts that were prefilled here because their caches did not come.
    pub(super) transfers: (Vec<(&'static str, TransferStats)>, u64),
    /// Of a worker of a pair.
    pub(super) parameters: Option<Sample>,
}

impl Report<'_> {
    /// In Prometheus' text format.
    pub(super) fn text(&self) -> String {
        let mut out = Text {
            model: self.model,
            text: String::new(),
        };
        self.engine(&mut out);
        self.requests(&mut out);
        self.transfers(&mut out);
        if let Some(sample) = &self.parameters {
            parameters::write(&mut out, sample);
        }
        out.text
    }

    fn engine(&self, out: &mut Text<'_>) {
        let (status, pools) = (&self.status, &self.status.occupancy);
        let used = pools.blocks.saturating_sub(pools.idle_blocks);
        let gauges = [
            (
                "vllm:num_requests_running",
                "Answers that run.",
                status.running as f64,
            ),
            (
                "vllm:num_requests_waiting",
                "Answers that wait.",
                status.waiting as f64,
            ),
            (
                "vllm:kv_cache_usage_perc",
                "The part of the latent blocks that answers under way hold; 1 is all.",
                used as f64 / pools.all_blocks.max(1) as f64,
            ),
            (
                "kimi_linear:state_slots_used",
                "State slots that answers under way hold.",
                pools.slots.saturating_sub(pools.idle_slots) as f64,
            ),
            (
                "kimi_linear:state_slots",
                "State slots there are.",
                pools.all_slots as f64,
            ),
            (
                "kimi_linear:host_bytes",
                "Bytes of host memory that states and latents take.",
                pools.host_bytes as f64,
            ),
        ];
        for (name, help, value) in gauges {
            out.head(name, "gauge", help);
            out.line(name, &[], value);
        }
        let counters = [
            (
                "vllm:num_preemptions_total",
                "Number of preemptions.",
                status.preemptions,
            ),
            (
                "kimi_linear:evictions_total",
                "States and blocks that had to leave the device, or the cache.",
                pools.evictions,
            ),
        ];
        for (name, help, value) in counters {
            out.head(name, "counter", help);
            out.line(name, &[], value as f64);
        }
    }

    fn requests(&self, out: &mut Text<'_>) {
        let totals = &self.totals;
        let counters = [
            (
                "vllm:prompt_tokens_total",
                "Tokens of prompts.",
                totals.prompt_tokens,
            ),
            (
                "vllm:prefix_cache_hits_total",
                "Tokens of prompts that came from the cache.",
                totals.cached_tokens,
            ),
            (
                "vllm:generation_tokens_total",
                "Tokens generated.",
                totals.generated_tokens,
            ),
        ];
        for (name, help, value) in counters {
            out.head(name, "counter", help);
            out.line(name, &[], value as f64);
        }
        let queued = "kimi_linear:prefill_queue_tokens";
        out.head(
            queued,
            "gauge",
            "Prompt tokens that are still to be prefilled here.",
        );
        out.line(queued, &[], totals.queued_tokens as f64);
        if let Some(seconds) = self.seconds_per_token {
            let name = "kimi_linear:prefill_queue_seconds";
            out.head(name, "gauge", "Seconds that these take.");
            out.line(name, &[], seconds * totals.queued_tokens as f64);
        }
    }

    fn transfers(&self, out: &mut Text<'_>) {
        let (roles, recomputed) = &self.transfers;
        for series in SERIES {
            out.head(series.name, series.kind, series.help);
            for (role, stats) in roles {
                for (label, value) in (series.values)(stats) {
                    let role = ("role", *role);
                    let labels = [Some(role), label].into_iter().flatten();
                    out.line(series.name, &labels.collect::<Vec<_>>(), value);
                }
            }
        }
        let name = "kimi_linear:kv_transfer_recomputed_total";
        out.head(
            name,
            "counter",
            "Prompts that were read here because their caches did not come.",
        );
        out.line(name, &[], *recomputed as f64);
    }
}

type Labelled = Vec<(Option<(&'static str, &'static str)>, f64)>;

/// A metric of transfers.
struct Series {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    values: fn(&TransferStats) -> Labelled,
}

fn both(label: &'static str, names: [&'static str; 2], values: [f64; 2]) -> Labelled {
    let named = names.into_iter().zip(values);
    named
        .map(|(name, value)| (Some((label, name)), value))
        .collect()
}

fn ways(sent: u64, received: u64) -> Labelled {
    both(
        "direction",
        ["sent", "received"],
        [sent as f64, received as f64],
    )
}

fn one(value: f64) -> Labelled {
    vec![(None, value)]
}

const SERIES: [Series; 13] = [
    Series {
        name: "kimi_linear:kv_transfer_bytes_total",
        kind: "counter",
        help: "Bytes of caches and hand-offs, those sent again included.",
        values: |stats| ways(stats.payload_sent, stats.payload_received),
    },
    Series {
        name: "kimi_linear:kv_transfer_framing_bytes_total",
        kind: "counter",
        help: "Bytes around them: headers of frames, and frames without caches.",
        values: |stats| ways(stats.framing_sent, stats.framing_received),
    },
    Series {
        name: "kimi_linear:kv_transfer_records_total",
        kind: "counter",
        help: "Records of caches that engines gave or took.",
        values: |stats| ways(stats.records_sent, stats.records_received),
    },
    Series {
        name: "kimi_linear:kv_transfer_bytes_per_second",
        kind: "gauge",
        help: "Bytes of caches a second, both ways, of late.",
        values: |stats| one(stats.rate),
    },
    Series {
        name: "kimi_linear:kv_transfer_resent_total",
        kind: "counter",
        help: "Records and hand-offs sent again because their connection was lost.",
        values: |stats| one(stats.resent as f64),
    },
    Series {
        name: "kimi_linear:kv_transfer_stalled_seconds",
        kind: "gauge",
        help: "Seconds so far that something to send waited for the receiver's window, or for a socket.",
        values: |stats| {
            let times = [stats.stalled_for_window, stats.stalled_for_socket];
            both(
                "cause",
                ["window", "socket"],
                times.map(|time| time.as_secs_f64()),
            )
        },
    },
    Series {
        name: "kimi_linear:kv_transfer_tcp_retransmissions_total",
        kind: "counter",
        help: "TCP segments sent again, where the system tells.",
        values: |stats| one(stats.tcp_retransmissions as f64),
    },
    Series {
        name: "kimi_linear:kv_transfer_held_bytes",
        kind: "gauge",
        help: "Bytes on their way between two engines.",
        values: |stats| one(stats.held_bytes as f64),
    },
    Series {
        name: "kimi_linear:kv_transfer_connections",
        kind: "gauge",
        help: "Connections past their handshake.",
        values: |stats| one(stats.connections as f64),
    },
    Series {
        name: "kimi_linear:kv_transfer_connections_lost_total",
        kind: "counter",
        help: "Connections that were lost.",
        values: |stats| one(stats.connections_lost as f64),
    },
    Series {
        name: "kimi_linear:kv_transfer_connections_refused_total",
        kind: "counter",
        help: "Connections refused in their handshake.",
        values: |stats| one(stats.connections_refused as f64),
    },
    Series {
        name: "kimi_linear:kv_transfers",
        kind: "gauge",
        help: "Transfers that wait for the other side, and that are under way.",
        values: |stats| {
            let counts = [stats.waiting, stats.active];
            both(
                "state",
                ["waiting", "active"],
                counts.map(|count| count as f64),
            )
        },
    },
    Series {
        name: "kimi_linear:kv_transfers_total",
        kind: "counter",
        help: "Transfers that have ended, by how.",
        values: |stats| {
            let ended = [
                ("completed", stats.completed),
                ("cancelled", stats.cancelled),
                ("expired", stats.expired),
                ("failed", stats.failed),
            ];
            let ended = ended.into_iter();
            ended
                .map(|(how, count)| (Some(("outcome", how)), count as f64))
                .collect()
        },
    },
];

/// Text that grows.
pub(super) struct Text<'a> {
    model: &'a str,
    text: String,
}

impl Text<'_> {
    pub(super) fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    pub(super) fn line(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        let model = self.model.replace('\\', "\\\\").replace('"', "\\\"");
        let _ = write!(self.text, "{name}{{model_name=\"{model}\"");
        for (label, value) in labels {
            let _ = write!(self.text, ",{label}=\"{value}\"");
        }
        let _ = writeln!(self.text, "}} {value}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kimi_linear::data_parallel::{ParameterState, Parameters, ReplicaParameters};

    #[test]
    fn a_report_has_a_line_for_each_value() {
        let mut stats = TransferStats::default();
        (stats.payload_sent, stats.completed) = (1234, 5);
        let report = Report {
            model: "a \"b\"",
            status: Status {
                running: 2,
                ..Status::default()
            },
            totals: Totals {
                queued_tokens: 1000,
                ..Totals::default()
            },
            seconds_per_token: Some(0.002),
            transfers: (vec![("kv_producer", stats)], 7),
            parameters: Some(Sample {
                parameters: Parameters {
                    drops: 3,
                    replicas: vec![ReplicaParameters {
                        state: ParameterState::Dropped,
                        group: vec![0, 1],
                        ..ReplicaParameters::default()
                    }],
                    ..Parameters::default()
                },
                paired: true,
            }),
        };
        let text = report.text();
        let lines = [
            "vllm:num_requests_running{model_name=\"a \\\"b\\\"\"} 2",
            "kimi_linear:prefill_queue_seconds{model_name=\"a \\\"b\\\"\"} 2",
            "kimi_linear:kv_transfer_bytes_total{model_name=\"a \\\"b\\\"\",role=\"kv_producer\",direction=\"sent\"} 1234",
            "kimi_linear:kv_transfers_total{model_name=\"a \\\"b\\\"\",role=\"kv_producer\",outcome=\"completed\"} 5",
            "kimi_linear:kv_transfer_recomputed_total{model_name=\"a \\\"b\\\"\"} 7",
            "kimi_linear:parameter_peer_connected{model_name=\"a \\\"b\\\"\"} 1",
            "kimi_linear:parameter_state{model_name=\"a \\\"b\\\"\",state=\"dropped\"} 1",
            "kimi_linear:parameter_state{model_name=\"a \\\"b\\\"\",state=\"whole\"} 0",
            "kimi_linear:parameter_group_replicas{model_name=\"a \\\"b\\\"\"} 2",
            "kimi_linear:parameter_drops_total{model_name=\"a \\\"b\\\"\"} 3",
        ];
        for line in lines {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        // Every metric is described once.
        let heads: Vec<_> = text
            .lines()
            .filter(|line| line.starts_with("# TYPE"))
            .collect();
        let mut unique = heads.clone();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(heads.len(), unique.len());
    }

    #[test]
    fn what_only_the_prefix_cache_holds_is_no_load() {
        let mut status = Status::default();
        status.occupancy.blocks = 30;
        status.occupancy.idle_blocks = 20;
        status.occupancy.all_blocks = 40;
        let load = snapshot(&status, Totals::default());
        assert_eq!((load.kv_used_blocks, load.kv_total_blocks), (10, 40));
        assert_eq!(load.gpu_cache_usage, 0.25);
        assert_eq!(load.kv_cache_hit_rate, None);
    }
}
