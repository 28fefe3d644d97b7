//! Prometheus metrics: vLLM's names where vLLM has the metric, `kimi_linear:` as the prefix of the others.
//!
//! Times are measured at the engine's events, so that slow clients do not affect them.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use metrics::{Counter, Gauge, Histogram, Key, Label, Level, Metadata, Recorder};
use metrics_exporter_prometheus::{
    Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};

use super::kv_metrics::KvMetrics;
#[cfg(feature = "data-parallel")]
use super::parameter_metrics::ParameterMetrics;
use crate::connector::Connector;
#[cfg(feature = "data-parallel")]
use crate::data_parallel::Parameters;
use crate::engine::{Event, FinishReason, Status, Usage};

const SECONDS: [f64; 20] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0,
];
const TOKENS: [f64; 14] = [
    1.0, 2.0, 5.0, 10.0, 50.0, 100.0, 200.0, 500.0, 1e3, 5e3, 1e4, 1e5, 5e5, 1e6,
];

const METADATA: Metadata<'static> =
    Metadata::new(module_path!(), Level::INFO, Some(module_path!()));

/// All metrics.
pub(super) struct Metrics {
    make: Maker,
    handle: PrometheusHandle,
    /// Set once the server takes part in cache transfers.
    transfers: OnceLock<KvMetrics>,
    /// Set once there are replicas that drop parameters.
    #[cfg(feature = "data-parallel")]
    parameters: OnceLock<ParameterMetrics>,
    pools: Pools,
    counts: Counts,
    times: Times,
    /// Recent queueing time of requests, in microseconds.
    wait_micros: AtomicU64,
}

/// What the engine holds and has evicted, from its status.
struct Pools {
    running: Gauge,
    waiting: Gauge,
    cache_usage: Gauge,
    slots: Gauge,
    all_slots: Gauge,
    checkpoints: [Gauge; 2],
    host_bytes: Gauge,
    preemptions: Counter,
    evictions: Counter,
    drafts: Counter,
    draft_tokens: Counter,
    accepted_tokens: Counter,
}

/// Numbers of tokens, answers and refusals.
struct Counts {
    queries: Counter,
    hits: Counter,
    prompt_tokens: Counter,
    generation_tokens: Counter,
    finished: [Counter; 4],
    refused: [Counter; 3],
    schema_violations: Counter,
}

/// Latencies in seconds, and sizes in tokens.
struct Times {
    first_token: Histogram,
    inter_token: Histogram,
    whole: Histogram,
    queued: Histogram,
    prompt_sizes: Histogram,
    answer_sizes: Histogram,
}

/// Why a request was refused.
#[derive(Clone, Copy)]
pub(super) enum Refused {
    /// Invalid: any status from 400 on except the others.
    Invalid,
    /// The queue is full.
    Overloaded,
    /// Loading, or shutting down.
    Unavailable,
}

/// Creates series, each with the model's name as a label.
pub(super) struct Maker {
    recorder: PrometheusRecorder,
    model: String,
}

impl Maker {
    fn key(
        &self,
        name: &'static str,
        labels: impl IntoIterator<Item = (&'static str, &'static str)>,
    ) -> Key {
        let model = Label::new("model_name", self.model.clone());
        let more = labels.into_iter();
        let more = more.map(|(name, value)| Label::new(name, value));
        Key::from_parts(name, [model].into_iter().chain(more).collect::<Vec<_>>())
    }

    pub(super) fn counter(
        &self,
        name: &'static str,
        what: &'static str,
        label: impl IntoIterator<Item = (&'static str, &'static str)>,
    ) -> Counter {
        self.recorder
            .describe_counter(name.into(), None, what.into());
        self.recorder
            .register_counter(&self.key(name, label), &METADATA)
    }

    pub(super) fn gauge(
        &self,
        name: &'static str,
        what: &'static str,
        label: impl IntoIterator<Item = (&'static str, &'static str)>,
    ) -> Gauge {
        self.recorder.describe_gauge(name.into(), None, what.into());
        self.recorder
            .register_gauge(&self.key(name, label), &METADATA)
    }

    /// A gauge of one of several replicas.
    #[cfg(feature = "data-parallel")]
    pub(super) fn replica_gauge(
        &self,
        name: &'static str,
        what: &'static str,
        replica: usize,
        label: Option<(&'static str, &'static str)>,
    ) -> Gauge {
        self.recorder.describe_gauge(name.into(), None, what.into());
        let number = Label::new("replica", replica.to_string());
        let key = self.key(name, label).with_extra_labels(vec![number]);
        self.recorder.register_gauge(&key, &METADATA)
    }

    fn histogram(&self, name: &'static str, what: &'static str) -> Histogram {
        self.recorder
            .describe_histogram(name.into(), None, what.into());
        self.recorder
            .register_histogram(&self.key(name, None), &METADATA)
    }
}

impl Pools {
    fn new(make: &Maker) -> Self {
        let gauge = |name, what| make.gauge(name, what, None);
        let checkpoints = |place| {
            let what = "Checkpoints of KDA states that prompts can go on from, by where they are.";
            make.gauge("kimi_linear:checkpoints", what, Some(("place", place)))
        };
        Self {
            running: gauge("vllm:num_requests_running", "Answers that run."),
            waiting: gauge("vllm:num_requests_waiting", "Answers that wait."),
            cache_usage: gauge(
                "vllm:kv_cache_usage_perc",
                "The part of the latent blocks that answers under way hold; 1 is all.",
            ),
            slots: gauge(
                "kimi_linear:state_slots_used",
                "State slots that answers under way hold.",
            ),
            all_slots: gauge("kimi_linear:state_slots", "State slots there are."),
            checkpoints: ["device", "host"].map(checkpoints),
            host_bytes: gauge(
                "kimi_linear:host_cache_bytes",
                "Bytes of host memory that hold states and latents.",
            ),
            preemptions: make.counter("vllm:num_preemptions_total", "Number of preemptions.", None),
            evictions: make.counter(
                "kimi_linear:evictions_total",
                "States and blocks that had to leave the device, or the cache.",
                None,
            ),
            drafts: make.counter(
                "vllm:spec_decode_num_drafts_total",
                "Proposals of speculation.",
                None,
            ),
            draft_tokens: make.counter(
                "vllm:spec_decode_num_draft_tokens_total",
                "Tokens that were proposed.",
                None,
            ),
            accepted_tokens: make.counter(
                "vllm:spec_decode_num_accepted_tokens_total",
                "Proposed tokens that the model drew too.",
                None,
            ),
        }
    }

    fn set(&self, status: &Status) {
        let pools = &status.occupancy;
        let part = |used: usize, all: usize| used as f64 / all.max(1) as f64;
        self.running.set(status.running as f64);
        self.waiting.set(status.waiting as f64);
        self.cache_usage
            .set(part(pools.blocks - pools.idle_blocks, pools.all_blocks));
        self.slots.set((pools.slots - pools.idle_slots) as f64);
        self.all_slots.set(pools.all_slots as f64);
        self.checkpoints[0].set(pools.device_checkpoints as f64);
        self.checkpoints[1].set(pools.host_checkpoints as f64);
        self.host_bytes.set(pools.host_bytes as f64);
        self.preemptions.absolute(status.preemptions);
        self.evictions.absolute(pools.evictions);
        let speculated = &status.speculated;
        self.drafts.absolute(speculated.drafts);
        self.draft_tokens.absolute(speculated.draft_tokens);
        self.accepted_tokens.absolute(speculated.accepted_tokens);
    }
}

impl Counts {
    fn new(make: &Maker) -> Self {
        let counter = |name, what| make.counter(name, what, None);
        let finished = |reason| {
            let what = "Answers that are complete, by why they ended.";
            make.counter(
                "vllm:request_success_total",
                what,
                Some(("finished_reason", reason)),
            )
        };
        let refused = |reason| {
            let what = "Requests that were refused.";
            make.counter(
                "kimi_linear:requests_refused_total",
                what,
                Some(("reason", reason)),
            )
        };
        Self {
            queries: counter(
                "vllm:prefix_cache_queries_total",
                "Tokens of prompts that were looked for in the cache.",
            ),
            hits: counter(
                "vllm:prefix_cache_hits_total",
                "Tokens of prompts that were in it and did not run.",
            ),
            prompt_tokens: counter(
                "vllm:prompt_tokens_total",
                "Tokens of prompts, those from the cache included.",
            ),
            generation_tokens: counter("vllm:generation_tokens_total", "Tokens generated."),
            finished: ["stop", "length", "abort", "error"].map(finished),
            refused: ["invalid", "overloaded", "unavailable"].map(refused),
            schema_violations: counter(
                "kimi_linear:schema_violations_total",
                "Complete answers that do not follow their JSON schema.",
            ),
        }
    }
}

impl Times {
    fn new(make: &Maker) -> Self {
        Self {
            first_token: make.histogram(
                "vllm:time_to_first_token_seconds",
                "From a request's arrival to its first token.",
            ),
            inter_token: make.histogram(
                "vllm:inter_token_latency_seconds",
                "From one token of an answer to the next.",
            ),
            whole: make.histogram(
                "vllm:e2e_request_latency_seconds",
                "From a request's arrival to its last token.",
            ),
            queued: make.histogram(
                "vllm:request_queue_time_seconds",
                "From a request's arrival to its first piece of prompt.",
            ),
            prompt_sizes: make.histogram("vllm:request_prompt_tokens", "Tokens of a prompt."),
            answer_sizes: make.histogram("vllm:request_generation_tokens", "Tokens of an answer."),
        }
    }
}

impl Metrics {
    /// All series at zero.
    pub(super) fn new(model: &str) -> Self {
        // Buckets are never empty, which is the only possible error.
        let builder = PrometheusBuilder::new();
        let builder = builder
            .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS)
            .and_then(|builder| {
                builder.set_buckets_for_metric(Matcher::Suffix("_tokens".to_owned()), &TOKENS)
            })
            .unwrap_or_else(|_| PrometheusBuilder::new());
        let make = Maker {
            recorder: builder.build_recorder(),
            model: model.to_owned(),
        };
        Self {
            handle: make.recorder.handle(),
            transfers: OnceLock::new(),
            #[cfg(feature = "data-parallel")]
            parameters: OnceLock::new(),
            pools: Pools::new(&make),
            counts: Counts::new(&make),
            times: Times::new(&make),
            wait_micros: AtomicU64::new(0),
            make,
        }
    }

    /// Updates the series of cache transfers.
    pub(super) fn transfers(&self, connector: &Connector) {
        let (roles, recomputed) = connector.stats();
        let names: Vec<_> = roles.iter().map(|(role, _)| *role).collect();
        let metrics = self
            .transfers
            .get_or_init(|| KvMetrics::new(&self.make, &names));
        metrics.set(&roles, recomputed);
    }

    /// Updates the series of replicas' parameters.
    #[cfg(feature = "data-parallel")]
    pub(super) fn parameters(&self, now: &Parameters) {
        let metrics = self
            .parameters
            .get_or_init(|| ParameterMetrics::new(&self.make, now.replicas.len()));
        metrics.set(now);
    }

    /// The text for Prometheus; without a status, while loading, the pool metrics are unchanged.
    pub(super) fn render(&self, status: Option<Status>) -> String {
        if let Some(status) = status {
            self.pools.set(&status);
        }
        self.handle.render()
    }

    /// Compacts the recorded values; must be called every few seconds.
    pub(super) fn upkeep(&self) {
        self.handle.run_upkeep();
    }

    pub(super) fn refused(&self, why: Refused) {
        self.counts.refused[why as usize].increment(1);
    }

    pub(super) fn schema_violated(&self) {
        self.counts.schema_violations.increment(1);
    }

    /// Seconds after which to retry a refused request: about as long as recent requests had to wait.
    pub(super) fn retry_after(&self) -> u64 {
        let wait = Duration::from_micros(self.wait_micros.load(Ordering::Relaxed));
        wait.as_secs().clamp(1, 60)
    }

    fn waited(&self, wait: Duration) {
        self.times.queued.record(wait.as_secs_f64());
        let (old, new) = (
            self.wait_micros.load(Ordering::Relaxed),
            u64::try_from(wait.as_micros()).unwrap_or(u64::MAX),
        );
        let mean = old - old / 8 + new / 8;
        self.wait_micros.store(mean, Ordering::Relaxed);
    }
}

/// Counts the events of one request.
pub(super) struct Watch {
    metrics: std::sync::Arc<Metrics>,
    arrived: Instant,
    prompt_tokens: usize,
    looks_up: bool,
    /// Whether the engine has taken it.
    taken: bool,
    placed: bool,
    /// The time of each answer's last token.
    last: Vec<Option<Instant>>,
    /// The id for the log, if requests are logged.
    log: Option<String>,
}

impl Watch {
    pub(super) fn new(
        metrics: std::sync::Arc<Metrics>,
        request: &crate::engine::Request,
        log: Option<String>,
    ) -> Self {
        Self {
            metrics,
            arrived: Instant::now(),
            prompt_tokens: request.prompt.len(),
            looks_up: request.reuse,
            taken: false,
            placed: false,
            last: vec![None; request.samples],
            log,
        }
    }

    pub(super) fn see(&mut self, event: &Event) {
        let now = Instant::now();
        match event {
            Event::Prefill { cached, .. } if !self.placed => {
                self.placed = true;
                let metrics = &self.metrics;
                metrics.waited(now - self.arrived);
                metrics
                    .counts
                    .prompt_tokens
                    .increment(self.prompt_tokens as u64);
                metrics.times.prompt_sizes.record(self.prompt_tokens as f64);
                if self.looks_up {
                    metrics.counts.queries.increment(self.prompt_tokens as u64);
                    metrics.counts.hits.increment(*cached as u64);
                }
            }
            Event::Token { sample, .. } => {
                let Some(last) = self.last.get_mut(*sample) else {
                    return;
                };
                match last.replace(now) {
                    None => {
                        let since = now - self.arrived;
                        self.metrics.times.first_token.record(since.as_secs_f64());
                    }
                    Some(before) => self
                        .metrics
                        .times
                        .inter_token
                        .record((now - before).as_secs_f64()),
                }
                self.metrics.counts.generation_tokens.increment(1);
            }
            Event::Queued { .. } => self.taken = true,
            Event::Finished { reason, usage, .. } => self.finished(now, *reason, *usage),
            // What was refused is counted as that, by its status.
            Event::Failed(_) if !self.taken => {}
            Event::Failed(error) => {
                self.metrics.counts.finished[3].increment(1);
                if let Some(id) = &self.log {
                    tracing::info!(request = id, "failed: {error}");
                }
            }
            _ => {}
        }
    }

    fn finished(&self, now: Instant, reason: FinishReason, usage: Usage) {
        let metrics = &self.metrics;
        metrics
            .times
            .whole
            .record((now - self.arrived).as_secs_f64());
        metrics
            .times
            .answer_sizes
            .record(usage.generated_tokens as f64);
        let reason = match reason {
            FinishReason::Stop => (0, "stop"),
            FinishReason::Length => (1, "length"),
            FinishReason::Cancelled => (2, "abort"),
        };
        metrics.counts.finished[reason.0].increment(1);
        if let Some(id) = &self.log {
            tracing::info!(
                request = id,
                prompt_tokens = usage.prompt_tokens,
                cached_tokens = usage.cached_tokens,
                generated_tokens = usage.generated_tokens,
                reason = reason.1,
                seconds = (now - self.arrived).as_secs_f64(),
                "answered"
            );
        }
    }
}
