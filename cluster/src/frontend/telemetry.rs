//! What the workers tell over HTTP, read once a second: bytes on the link, queues, and their pools.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use futures::future::join_all;
use kimi_linear::cache::Occupancy;
use kimi_linear::engine::Status;
use kimi_linear::error::EngineError;
use kimi_linear_plan::route::Site;
use tokio::runtime::Handle;

use super::exposition::Samples;
use crate::policy::Told;
use crate::policy::members::{Member, MemberKey, Members};
use crate::wire::Role;

/// How long a worker may take to answer; it is asked every second.
const PATIENCE: Duration = Duration::from_millis(900);

/// How long a worker may take to remove its cached prefixes: a step may have to end first.
const CLEARING: Duration = Duration::from_secs(30);

/// Bytes of data in a TCP segment on Ethernet.
const SEGMENT: u64 = 1448;

/// What one worker has told.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct WorkerTold {
    /// Bytes of caches that it has sent.
    pub sent_bytes: u64,
    /// TCP segments that it has sent again.
    pub resent_segments: u64,
    /// Bytes that it is about to send.
    pub queued_bytes: u64,
    /// Node-seconds of queued prefill, if it tells.
    pub queue_seconds: Option<f64>,
    /// Running answers, waiting ones, and its pools.
    pub status: Status,
}

impl WorkerTold {
    fn of(samples: &Samples) -> Self {
        let sum = |name: &str, label| samples.sum(name, label).unwrap_or_default();
        let sent = Some(("direction", "sent"));
        // A decode worker holds what it receives; that waits at no link.
        let produced = Some(("role", "kv_producer"));
        let count = |value: f64| value.max(0.0) as usize;
        let slots = count(sum("kimi_linear:state_slots", None));
        let used = count(sum("kimi_linear:state_slots_used", None));
        let checkpoints = |place| count(sum("kimi_linear:checkpoints", Some(("place", place))));
        Self {
            sent_bytes: sum("kimi_linear:kv_transfer_bytes_total", sent) as u64,
            resent_segments: sum("kimi_linear:kv_transfer_tcp_retransmissions_total", None) as u64,
            queued_bytes: sum("kimi_linear:kv_transfer_held_bytes", produced) as u64,
            queue_seconds: samples.sum("kimi_linear:prefill_queue_seconds", None),
            status: Status {
                running: count(sum("vllm:num_requests_running", None)),
                waiting: count(sum("vllm:num_requests_waiting", None)),
                preemptions: sum("vllm:num_preemptions_total", None) as u64,
                occupancy: Occupancy {
                    slots: used,
                    all_slots: slots,
                    device_checkpoints: checkpoints("device"),
                    host_checkpoints: checkpoints("host"),
                    host_bytes: sum("kimi_linear:host_cache_bytes", None) as u64,
                    evictions: sum("kimi_linear:evictions_total", None) as u64,
                    ..Occupancy::default()
                },
                ..Status::default()
            },
        }
    }
}

/// Counters of which each worker has its own, and begins at zero again when it restarts.
#[derive(Debug, Default)]
struct Counter {
    last: HashMap<u64, u64>,
    sum: u64,
}

impl Counter {
    fn take(&mut self, worker: u64, value: u64) {
        let before = self.last.insert(worker, value).unwrap_or(0);
        // What it had counted before a restart is in the sum already.
        self.sum += value.checked_sub(before).unwrap_or(value);
    }
}

#[derive(Debug, Default)]
struct State {
    workers: HashMap<u64, WorkerTold>,
    sent: Counter,
    resent: Counter,
    told: Told,
}

/// Asks the workers.
pub struct Telemetry {
    http: reqwest::Client,
    runtime: Handle,
    state: Mutex<State>,
}

impl Telemetry {
    /// A client that blocks on `runtime` where its caller may block.
    ///
    /// # Errors
    /// The system gives it no resolver.
    pub fn new(runtime: Handle) -> anyhow::Result<Self> {
        // Workers are in this network: a proxy would not find them.
        let http = reqwest::Client::builder().no_proxy().build();
        Ok(Self {
            http: http.context("cannot set up the client for the workers' metrics")?,
            runtime,
            state: Mutex::default(),
        })
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks all workers that have a control address; the counters of the clusters.
    pub async fn read(&self, members: &Members) -> Told {
        let members = members.all();
        let asked = members.iter().filter_map(|(key, member)| {
            let control = member.control.clone()?;
            Some(async move { (key.id, self.ask(&control).await) })
        });
        let told = join_all(asked).await;
        self.take(&members, told)
    }

    async fn ask(&self, control: &str) -> Option<WorkerTold> {
        let request = self.http.get(format!("{control}/metrics"));
        let response = request.timeout(PATIENCE).send().await;
        let read = async { response?.error_for_status()?.text().await };
        match read.await {
            Ok(text) => Some(WorkerTold::of(&Samples::parse(&text))),
            Err(error) => {
                tracing::debug!("{control}/metrics cannot be read: {error}");
                None
            }
        }
    }

    /// Takes what workers have told; one that has not keeps what it told last, as long as it is there.
    fn take(&self, members: &[(MemberKey, Member)], told: Vec<(u64, Option<WorkerTold>)>) -> Told {
        let mut guard = self.state();
        let state = &mut *guard;
        let is_there = |id: &u64| members.iter().any(|(key, _)| key.id == *id);
        state.workers.retain(|id, _| is_there(id));
        for counter in [&mut state.sent, &mut state.resent] {
            counter.last.retain(|id, _| is_there(id));
        }
        for (id, worker) in told {
            let Some(worker) = worker else { continue };
            state.workers.insert(id, worker);
            let is_far = members
                .iter()
                .any(|(key, member)| key.id == id && member.site == Site::Prfaas);
            if is_far {
                state.sent.take(id, worker.sent_bytes);
                state.resent.take(id, worker.resent_segments);
            }
        }
        let of_site = |site: Site| {
            members.iter().filter_map(move |(key, member)| {
                let prefills = member.role == Role::Prefill && member.site == site;
                prefills.then_some(key.id)
            })
        };
        let queue = |site: Site| {
            let workers = of_site(site).map(|id| state.workers.get(&id));
            let seconds: Option<Vec<f64>> = workers
                .map(|worker| worker.and_then(|worker| worker.queue_seconds))
                .collect();
            seconds.map(|seconds| seconds.iter().sum())
        };
        let queued = of_site(Site::Prfaas).filter_map(|id| state.workers.get(&id));
        state.told = Told {
            sent_bytes: state.sent.sum,
            retransmitted_bytes: state.resent.sum.saturating_mul(SEGMENT),
            queued_bytes: queued.map(|worker| worker.queued_bytes).sum(),
            prfaas_queue_seconds: queue(Site::Prfaas),
            local_queue_seconds: queue(Site::Local),
        };
        state.told
    }

    /// The counters of the clusters when they were last read.
    #[must_use]
    pub fn told(&self) -> Told {
        self.state().told
    }

    /// What a worker has told last.
    #[must_use]
    pub fn worker(&self, id: u64) -> Option<WorkerTold> {
        self.state().workers.get(&id).copied()
    }

    /// The sum over all workers.
    #[must_use]
    pub fn status(&self) -> Status {
        let mut sum = Status::default();
        for worker in self.state().workers.values() {
            let Status {
                running,
                waiting,
                preemptions,
                occupancy,
                // What the server does not tell of workers; each tells its own parameters.
                speculated: _,
                demand: _,
                suspended: _,
            } = worker.status;
            sum.running += running;
            sum.waiting += waiting;
            sum.preemptions += preemptions;
            let all = &mut sum.occupancy;
            all.slots += occupancy.slots;
            all.all_slots += occupancy.all_slots;
            all.device_checkpoints += occupancy.device_checkpoints;
            all.host_checkpoints += occupancy.host_checkpoints;
            all.host_bytes += occupancy.host_bytes;
            all.evictions += occupancy.evictions;
        }
        sum
    }

    /// Has all workers remove their cached prefixes, and waits until they have. It must not be called on the runtime's own threads.
    ///
    /// # Errors
    /// [`EngineError::Unavailable`], with the workers that did not.
    pub fn clear_caches(&self, members: &Members) -> Result<(), EngineError> {
        let cleared = members.all().into_iter().map(|(key, member)| async move {
            let cleared = match &member.control {
                None => Err("it has no control address".to_owned()),
                Some(control) => {
                    self.order(
                        control,
                        "reset_prefix_cache",
                        &serde_json::json!({}),
                        CLEARING,
                    )
                    .await
                }
            };
            cleared.map_err(|reason| format!("worker {}: {reason}", key.id))
        });
        let cleared = self.runtime.block_on(join_all(cleared));
        let failed: Vec<_> = cleared.into_iter().filter_map(Result::err).collect();
        match failed.is_empty() {
            true => Ok(()),
            false => Err(EngineError::Unavailable {
                reason: format!("caches were not cleared: {}", failed.join("; ")),
            }),
        }
    }

    /// Has a worker carry out an update (`/engine/update/..`).
    ///
    /// # Errors
    /// What the worker says, or why it cannot be asked.
    pub async fn order(
        &self,
        control: &str,
        update: &str,
        body: &serde_json::Value,
        within: Duration,
    ) -> Result<(), String> {
        let url = format!("{control}/engine/update/{update}");
        let sent = self.http.post(&url).timeout(within).json(body).send().await;
        let response = sent.map_err(|error| error.to_string())?;
        let status = response.status();
        let text = response.text().await.map_err(|error| error.to_string())?;
        let told: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        // A refused update has status 200 too.
        match told["status"].as_str() {
            Some("ok" | "accepted") if status.is_success() => Ok(()),
            _ => {
                let message = told["message"].as_str().unwrap_or(&text);
                Err(format!("{url}: {status}: {message}"))
            }
        }
    }
}

/// Asks all workers once a second, and passes what they tell to `each`.
pub async fn watch(
    telemetry: Arc<Telemetry>,
    members: Arc<Members>,
    mut each: impl FnMut(Told) + Send,
) {
    let mut second = tokio::time::interval(Duration::from_secs(1));
    second.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        second.tick().await;
        each(telemetry.read(&members).await);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Registration;

    const TEXT: &str = "\
# HELP vllm:num_requests_running Answers that run.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{model_name=\"m\",dynamo_component=\"backend\"} 2
vllm:num_requests_waiting{model_name=\"m\"} 3
kimi_linear:state_slots{model_name=\"m\"} 16
kimi_linear:state_slots_used{model_name=\"m\"} 4
kimi_linear:kv_transfer_bytes_total{model_name=\"m\",role=\"kv_producer\",direction=\"sent\"} 1e6
kimi_linear:kv_transfer_bytes_total{model_name=\"m\",role=\"kv_producer\",direction=\"received\"} 7
kimi_linear:kv_transfer_tcp_retransmissions_total{role=\"kv_producer\"} 2
kimi_linear:kv_transfer_held_bytes{role=\"kv_producer\"} 4096
kimi_linear:kv_transfer_held_bytes{role=\"kv_consumer\"} 1
kimi_linear:prefill_queue_seconds 1.5
";

    fn member(id: u64, cluster: &str) -> (MemberKey, Member) {
        let registration = Registration {
            cluster: cluster.to_owned(),
            role: Role::Prefill,
            control: Some("http://127.0.0.1:9".to_owned()),
            prefill_seconds_per_token: None,
            decode_seconds_per_token: None,
        };
        let key = MemberKey {
            endpoint: "n/prefill/generate".to_owned(),
            id,
        };
        (
            key,
            Member::new("m".to_owned(), Role::Prefill, Some(registration)),
        )
    }

    #[tokio::test]
    async fn counters_of_the_prfaas_cluster_are_summed_over_restarts() {
        let telemetry = Telemetry::new(Handle::current()).unwrap();
        let members = [member(1, "prfaas"), member(2, "prfaas"), member(3, "local")];
        let worker = WorkerTold::of(&Samples::parse(TEXT));
        let told = telemetry.take(&members, vec![(1, Some(worker)), (3, Some(worker))]);
        assert_eq!((told.sent_bytes, told.queued_bytes), (1_000_000, 4096));
        assert_eq!(told.retransmitted_bytes, 2 * SEGMENT);
        // One PrfaaS worker has not told its queue.
        assert_eq!(told.prfaas_queue_seconds, None);
        assert_eq!(told.local_queue_seconds, Some(1.5));
        let restarted = WorkerTold {
            sent_bytes: 500,
            ..worker
        };
        let told = telemetry.take(&members, vec![(1, Some(restarted)), (2, Some(worker))]);
        assert_eq!(told.sent_bytes, 2_000_500);
        assert_eq!(told.prfaas_queue_seconds, Some(3.0));
        // A worker that does not answer keeps what it told; one that has gone is forgotten.
        telemetry.take(&members[..2], vec![(1, None), (2, None)]);
        let status = telemetry.status();
        assert_eq!((status.running, status.waiting), (4, 6));
        assert_eq!(status.occupancy.all_slots, 32);
        assert_eq!(telemetry.worker(3), None);
    }
}
