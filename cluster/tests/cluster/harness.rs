//! A cluster of processes for a test, a single server to compare it with, and clients.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::Ipv4Addr;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kimi_linear::backend::BackendKind;
use kimi_linear::engine::{EngineOptions, EngineSizes, PREFILL_CHUNK};
use kimi_linear::llm::{LlmFiles, LlmOptions};
use kimi_linear::server::{Server, ServerOptions};
use kimi_linear_cluster::demo::load::{Client, LoadError};
use kimi_linear_cluster::demo::processes::{
    Cluster, ClusterOptions, Network, Process, Programs, Role,
};
use kimi_linear_cluster::demo::status::{ClusterState, Routed, sum};
use serde_json::{Value, json};
use tokio::sync::{Mutex, MutexGuard, oneshot};

/// Most tokens of prompt and answer.
pub const CONTEXT: usize = 4096;

/// Time without anything after which a request hangs.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Processes of one test at a time: the machine has few cores.
static ALONE: Mutex<()> = Mutex::const_new(());

/// Runs a test alone, and fails it after so many seconds.
pub async fn limited(seconds: u64, test: impl Future<Output = ()>) {
    let _alone: MutexGuard<'_, ()> = ALONE.lock().await;
    let limit = Duration::from_secs(seconds);
    if tokio::time::timeout(limit, test).await.is_err() {
        panic!("the test is not done after {seconds} s");
    }
}

/// What the processes of a test are started with: workers of these roles, with logs in a folder of the test's name.
pub fn options(name: &str, workers: &[(Role, usize)]) -> ClusterOptions {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let programs = Programs {
        worker: env!("CARGO_BIN_EXE_kimi-linear-worker").into(),
        frontend: env!("CARGO_BIN_EXE_kimi-linear-frontend").into(),
    };
    // Every test has addresses of its own: ports that an earlier one has left are not in its way.
    let [test, process] = [
        NEXT.fetch_add(1, Ordering::SeqCst),
        std::process::id() as u8,
    ];
    let address = |cluster| Ipv4Addr::new(127, 64 + process % 128, test, cluster);
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    ClusterOptions {
        network: Arc::new(Network::loopback_at(address(1), address(2))),
        workers: workers.iter().copied().collect(),
        context: Some(CONTEXT),
        sequences: Some(8),
        ..ClusterOptions::new(programs, kimi_linear::demo::folder().unwrap(), folder)
    }
}

/// One worker each for local prefill, decode and PrfaaS prefill.
pub const EACH: [(Role, usize); 3] = [(Role::Prefill, 1), (Role::Decode, 1), (Role::Prfaas, 1)];

pub async fn start(options: ClusterOptions) -> Cluster {
    let folder = options.folder.clone();
    let since = Instant::now();
    let cluster = Cluster::start(options)
        .await
        .unwrap_or_else(|e| panic!("{e}"));
    let took = since.elapsed();
    println!("started in {took:.1?}; logs in {}", folder.display());
    cluster
}

/// A client whose requests fail if nothing comes for [`PATIENCE`].
pub fn client(url: &str) -> Client {
    Client::new(url, PATIENCE).unwrap()
}

/// A server of the same model inside the test.
pub struct Single {
    client: Client,
    _stop: oneshot::Sender<()>,
}

impl Single {
    pub async fn start() -> Self {
        let llm = tokio::task::spawn_blocking(|| {
            let options = LlmOptions {
                sizes: EngineSizes {
                    sequences: 8,
                    context: CONTEXT,
                    prefill_chunk: PREFILL_CHUNK,
                    scored: 64,
                    checkpoints: 8,
                    blocks: None,
                    speculative: 0,
                },
                cache: None,
                engine: EngineOptions {
                    host_bytes: 64 << 20,
                    ..EngineOptions::default()
                },
            };
            let backend = kimi_linear::backend::open(BackendKind::Cpu, None).unwrap();
            let files = LlmFiles::demo().unwrap();
            files
                .load(backend, &options, &mut |_, _| ControlFlow::Continue(()))
                .unwrap()
        });
        let llm = llm.await.unwrap();
        let options = ServerOptions::new("kimi-linear");
        let server = Server::bind(("127.0.0.1", 0), options).await.unwrap();
        let (url, opener) = (server.url(), server.opener());
        let (stop, stopped) = oneshot::channel::<()>();
        tokio::spawn(server.run(async {
            let _ = stopped.await;
        }));
        opener.open(llm.into(), None).unwrap();
        Self {
            client: client(&url),
            _stop: stop,
        }
    }

    /// The choices that it answers.
    pub async fn choices(&self, path: &str, body: &Value) -> Value {
        let answer = self.client.post(path, body).await;
        let answer = answer.unwrap_or_else(|error| panic!("a single server: {error}: {body}"));
        said(&answer)
    }
}

/// What of an answer must be the same.
pub fn said(answer: &Value) -> Value {
    assert!(answer["choices"].is_array(), "{answer}");
    answer["choices"].clone()
}

/// A greedy request with an answer of so many tokens to a prompt that begins with a number and has so many tokens, and the request's path.
pub fn completion(number: usize, prompt: usize, answer: usize) -> Value {
    let mut ids = vec![(number / 250) as u32, (number % 250) as u32];
    ids.extend((2..prompt).map(|at| ((at * 7 + number * 13) % 250) as u32));
    json!({
        "prompt": ids,
        "max_tokens": answer,
        "temperature": 0,
        "ignore_eos": true,
        "return_token_ids": true,
        "logprobs": 1,
    })
}

/// The path of [`completion`].
pub const COMPLETIONS: &str = "/v1/completions";

/// The routed requests of a cluster.
pub async fn routed(cluster: &Cluster) -> Vec<Routed> {
    cluster.status().routed(0).await.unwrap().0
}

/// Waits until a condition on the cluster's state holds.
pub async fn until(
    cluster: &Cluster,
    seconds: u64,
    what: &str,
    holds: impl Fn(&ClusterState) -> bool,
) {
    let since = Instant::now();
    loop {
        let state = cluster.status().cluster().await;
        match &state {
            Ok(state) if holds(state) => return,
            _ => {}
        }
        assert!(
            since.elapsed() < Duration::from_secs(seconds),
            "{what}: not after {seconds} s: {state:?}"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A series of a worker.
pub async fn metric(cluster: &Cluster, worker: Process, name: &str, labels: &[&str]) -> f64 {
    let url = cluster.worker_url(worker);
    let text = cluster.status().metrics(&url).await;
    sum(
        &text.unwrap_or_else(|e| panic!("{worker}: {e}")),
        name,
        labels,
    )
}

/// Series that are zero when a worker holds nothing for a request.
const HELD: [&str; 5] = [
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "kimi_linear:state_slots_used",
    "kimi_linear:kv_transfer_held_bytes",
];

/// Waits until no worker holds a slot, a block, a transfer or a request.
pub async fn assert_empties(cluster: &Cluster, seconds: u64) {
    let since = Instant::now();
    loop {
        let mut held = Vec::new();
        for worker in cluster.workers() {
            if cluster.id(worker).is_none() {
                continue;
            }
            let url = cluster.worker_url(worker);
            let text = cluster.status().metrics(&url).await.unwrap();
            for name in HELD {
                // A name that is missing would look like zero.
                assert!(text.contains(name), "{worker} has no {name}: {text}");
                let value = sum(&text, name, &[]);
                if value != 0.0 {
                    held.push(format!("{worker}: {name} {value}"));
                }
            }
        }
        if held.is_empty() {
            return;
        }
        assert!(
            since.elapsed() < Duration::from_secs(seconds),
            "after {seconds} s: {}",
            held.join(", ")
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Requests with known answers, sent one after the other by several clients until they are told to stop.
pub struct Known {
    pub bodies: Vec<Value>,
    pub expected: Vec<Value>,
}

impl Known {
    /// So many prompts of 40 to 700 tokens, answered by a single server. Every second one neither uses nor fills a cache.
    pub async fn new(single: &Single, count: usize, answer: usize) -> Self {
        let (mut bodies, mut expected) = (Vec::new(), Vec::new());
        for number in 0..count {
            let mut body = completion(number, 40 + (number * 97) % 660, answer);
            if number % 2 == 1 {
                body["cache_salt"] = json!("alone");
            }
            expected.push(single.choices(COMPLETIONS, &body).await);
            bodies.push(body);
        }
        Self { bodies, expected }
    }

    /// Fails if this is not the answer to request `index`: the same bits, or where a cached prefix may have rounded in another order
    /// the same tokens.
    pub fn assert_right(&self, index: usize, answer: &Value) {
        let (found, expected) = (said(answer), &self.expected[index]);
        if self.bodies[index].get("cache_salt").is_some() {
            assert_eq!(found, *expected, "request {index}");
        }
        let ids = |choices: &Value| choices[0]["token_ids"].clone();
        assert_eq!(ids(&found), ids(expected), "request {index}");
    }
}

/// What clients have seen so far.
#[derive(Default)]
pub struct Seen {
    pub right: AtomicUsize,
    pub failed: std::sync::Mutex<Vec<LoadError>>,
    stop: std::sync::atomic::AtomicBool,
}

impl Seen {
    pub fn right(&self) -> usize {
        self.right.load(Ordering::SeqCst)
    }

    pub fn failed(&self) -> Vec<LoadError> {
        self.failed.lock().unwrap().clone()
    }

    /// Prints each error once, with how often it came.
    pub fn print_failed(&self) {
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for error in self.failed() {
            *counts.entry(error.to_string()).or_default() += 1;
        }
        for (error, count) in counts {
            println!("  {count} failed: {error}");
        }
    }

    /// Lets every client finish its request and stop.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
    }

    /// Waits until so many more requests were answered.
    pub async fn more(&self, count: usize) {
        let enough = self.right() + count;
        while self.right() < enough {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Clients that ask until they are stopped. An answer must be the expected one, an error a sentence; a request that hangs fails the test.
pub fn clients(
    url: &str,
    count: usize,
    known: &Arc<Known>,
) -> (Arc<Seen>, Vec<tokio::task::JoinHandle<()>>) {
    let seen = Arc::new(Seen::default());
    let one = |first: usize| {
        let (client, known, seen) = (client(url), Arc::clone(known), Arc::clone(&seen));
        tokio::spawn(async move {
            for number in (first..).step_by(count) {
                if seen.stop.load(Ordering::SeqCst) {
                    return;
                }
                let index = number % known.bodies.len();
                match client.post(COMPLETIONS, &known.bodies[index]).await {
                    Ok(answer) => {
                        known.assert_right(index, &answer);
                        seen.right.fetch_add(1, Ordering::SeqCst);
                    }
                    Err(LoadError::Hangs(time)) => panic!("request {index} hangs for {time:?}"),
                    Err(error) => {
                        assert!(error.to_string().contains(' '), "no sentence: {error}");
                        seen.failed.lock().unwrap().push(error);
                        // A frontend that is gone refuses at once.
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                }
            }
        })
    };
    let tasks = (0..count).map(one).collect();
    (seen, tasks)
}

/// Stops the clients and passes their failures on.
pub async fn join(seen: &Seen, tasks: Vec<tokio::task::JoinHandle<()>>) {
    seen.stop();
    for task in tasks {
        task.await.unwrap();
    }
}
