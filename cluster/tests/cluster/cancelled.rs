//! Clients that go away at each stage of their request: in a queue, during the prefill, during the transfer, during the answer. Afterwards
//! nothing is held for them, and other requests are answered as before.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kimi_linear_cluster::demo::load::Client;
use kimi_linear_cluster::demo::processes::{Cluster, Process, Role, Threshold};
use kimi_linear_cluster::demo::status::NewThreshold;
use serde_json::Value;
use tokio::task::JoinHandle;

use super::harness::{
    self, COMPLETIONS, EACH, Single, assert_empties, completion, limited, metric, said, start,
};

/// A prompt of about a second.
const LONG: usize = 3500;
/// Seconds until nothing may be held. What was prefilled and is not fetched is kept for two minutes.
const EMPTY: u64 = 150;

/// A request under way.
struct Asked {
    task: JoinHandle<()>,
    tokens: Arc<AtomicUsize>,
}

impl Asked {
    fn new(client: &Client, body: Value) -> Self {
        let (client, tokens) = (client.clone(), Arc::new(AtomicUsize::new(0)));
        let counted = Arc::clone(&tokens);
        let task = tokio::spawn(async move {
            let each = |_: &Value| {
                counted.fetch_add(1, Ordering::SeqCst);
            };
            // Whether it ends by itself does not matter here.
            let _ = client.stream_each(COMPLETIONS, &body, each).await;
        });
        Self { task, tokens }
    }

    /// Waits for so many chunks.
    async fn tokens(&self, count: usize) {
        let wanted = self.tokens.load(Ordering::SeqCst) + count;
        eventually("chunks come", async || {
            self.tokens.load(Ordering::SeqCst) >= wanted
        })
        .await;
    }

    /// Closes its connection.
    async fn leave(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

async fn eventually(what: &str, holds: impl AsyncFn() -> bool) {
    let since = Instant::now();
    while !holds().await {
        assert!(since.elapsed() < Duration::from_secs(60), "not: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

struct Test {
    cluster: Cluster,
    client: Client,
    single: Single,
    number: usize,
}

impl Test {
    /// Workers that run so many sequences at a time.
    async fn start(name: &str, sequences: usize) -> Self {
        let mut options = harness::options(name, &EACH);
        options.threshold = Threshold::Never;
        options.sequences = Some(sequences);
        let cluster = start(options).await;
        let client = harness::client(&cluster.frontend_url());
        let single = Single::start().await;
        Self {
            cluster,
            client,
            single,
            number: 0,
        }
    }

    /// A prompt that was not asked before.
    fn body(&mut self, prompt: usize, answer: usize) -> Value {
        self.number += 1;
        completion(self.number, prompt, answer)
    }

    async fn is(&self, worker: Role, name: &str, labels: &[&str]) -> f64 {
        metric(&self.cluster, Process::worker(worker, 0), name, labels).await
    }

    /// Nothing is held, and a request is answered as by a single server.
    async fn goes_on(&mut self, stage: &str) {
        assert_empties(&self.cluster, EMPTY).await;
        let body = self.body(100, 8);
        let answer = self.client.post(COMPLETIONS, &body).await;
        let answer = answer.unwrap_or_else(|error| panic!("after {stage}: {error}"));
        let expected = self.single.choices(COMPLETIONS, &body).await;
        assert_eq!(said(&answer), expected, "after {stage}");
        self.cluster.check().unwrap();
    }

    /// So many clients have left in the frontend's counts too.
    async fn end(self, left: u64) {
        let state = self.cluster.status().cluster().await.unwrap();
        assert_eq!(state.requests.cancelled, left, "{:?}", state.requests);
        assert_eq!(state.requests.failed, 0, "{:?}", state.requests);
        self.cluster.shutdown().await;
    }

    async fn offload(&self, everything: bool) -> Role {
        let (threshold, role) = match everything {
            true => (NewThreshold::Tokens(0), Role::Prfaas),
            false => (NewThreshold::Named("none"), Role::Prefill),
        };
        self.cluster
            .status()
            .set_threshold(threshold)
            .await
            .unwrap();
        role
    }
}

const RUNNING: &str = "vllm:num_requests_running";
const WAITING: &str = "vllm:num_requests_waiting";
const TRANSFERS: &str = "kimi_linear:kv_transfers";

#[tokio::test(flavor = "multi_thread")]
async fn while_it_waits_in_a_queue() {
    limited(600, async {
        let mut test = Test::start("cancelled-queued", 1).await;
        for offloaded in [false, true] {
            let prefill = test.offload(offloaded).await;
            // The decode worker's only place is taken.
            let body = test.body(40, 3000);
            let first = Asked::new(&test.client, body);
            first.tokens(3).await;
            let body = test.body(40, 100);
            let second = Asked::new(&test.client, body);
            eventually("one waits for decode", async || {
                test.is(Role::Decode, WAITING, &[]).await > 0.0
            })
            .await;
            second.leave().await;
            eventually("nothing waits", async || {
                test.is(Role::Decode, WAITING, &[]).await == 0.0
            })
            .await;
            // The one that runs does not notice.
            first.tokens(3).await;
            first.leave().await;
            test.goes_on("a queue for decode").await;

            // The prefill worker's only place is taken.
            let body = test.body(LONG, 4);
            let first = Asked::new(&test.client, body);
            eventually("one is prefilled", async || {
                test.is(prefill, RUNNING, &[]).await > 0.0
            })
            .await;
            let body = test.body(LONG, 4);
            let second = Asked::new(&test.client, body);
            eventually("one waits for prefill", async || {
                test.is(prefill, WAITING, &[]).await > 0.0
            })
            .await;
            second.leave().await;
            first.leave().await;
            test.goes_on("a queue for prefill").await;
        }
        test.end(8).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_its_prompt_is_prefilled() {
    limited(600, async {
        let mut test = Test::start("cancelled-prefill", 4).await;
        for offloaded in [false, true] {
            let prefill = test.offload(offloaded).await;
            for delay in [0, 30, 150] {
                let body = test.body(LONG, 4);
                let asked = Asked::new(&test.client, body);
                eventually("it is prefilled", async || {
                    test.is(prefill, RUNNING, &[]).await > 0.0
                })
                .await;
                tokio::time::sleep(Duration::from_millis(delay)).await;
                asked.leave().await;
                test.goes_on("a prefill").await;
            }
        }
        test.end(6).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_its_caches_are_transferred() {
    limited(900, async {
        let mut test = Test::start("cancelled-transfer", 4).await;
        for offloaded in [false, true] {
            let prefill = test.offload(offloaded).await;
            let sender = Process::worker(prefill, 0);
            for sender_is_late in [false, true] {
                let body = test.body(LONG, 4);
                let asked = Asked::new(&test.client, body);
                eventually("its caches travel", async || {
                    test.is(Role::Decode, TRANSFERS, &["state=\"active\""])
                        .await
                        > 0.0
                })
                .await;
                // A sender that stands still keeps the transfer from being done before the client leaves.
                test.cluster.signal(sender, "STOP").await.unwrap();
                if sender_is_late {
                    let leaving = asked.leave();
                    let later = tokio::time::sleep(Duration::from_millis(500));
                    tokio::join!(leaving, later);
                    test.cluster.signal(sender, "CONT").await.unwrap();
                } else {
                    test.cluster.signal(sender, "CONT").await.unwrap();
                    asked.leave().await;
                }
                test.goes_on("a transfer").await;
            }
        }
        test.end(4).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_it_is_answered() {
    limited(600, async {
        let mut test = Test::start("cancelled-answer", 4).await;
        for offloaded in [false, true] {
            test.offload(offloaded).await;
            for chunks in [1, 2, 20] {
                let body = test.body(200, 3000);
                let asked = Asked::new(&test.client, body);
                asked.tokens(chunks).await;
                asked.leave().await;
                test.goes_on("an answer").await;
            }
        }
        test.end(6).await;
    })
    .await;
}
