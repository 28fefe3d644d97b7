//! Workers as processes, asked over Dynamo's request plane as a router asks them: prefill and decode apart, a change of role, a shutdown.

use std::path::Path;
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dynamo_backend_common::{FinishReason, LLMEngineOutput, PreprocessedRequest};
use dynamo_llm::protocols::common::preprocessor::{BootstrapInfo, PrefillResult};
use dynamo_runtime::discovery::{DiscoveryInstance, DiscoveryQuery, EventTransportKind};
use dynamo_runtime::distributed::{DiscoveryBackend, DistributedConfig, RequestPlaneMode};
use dynamo_runtime::pipeline::network::ResponsePlaneMode;
use dynamo_runtime::pipeline::{Context, PushRouter, RouterMode};
use dynamo_runtime::protocols::annotated::Annotated;
use dynamo_runtime::storage::kv::Selector;
use dynamo_runtime::{DistributedRuntime, Runtime};
use futures::StreamExt;
use kimi_linear::backend::{self, BackendKind};
use kimi_linear::engine::{Event, Request, Sampling};
use kimi_linear::llm::{LlmFiles, LlmOptions};
use kimi_linear_cluster::wire::{self, ChunkReader, Registration, Role};
use serde_json::{Value, json};
use tempfile::TempDir;

const MODEL: &str = "kimi-linear-demo";
const NAMESPACE: &str = "kimi-linear";
const PATIENCE: Duration = Duration::from_secs(60);

type Router = PushRouter<PreprocessedRequest, Annotated<LLMEngineOutput>>;

/// A worker's process, which ends with the test.
struct Process(Child);

impl Process {
    fn start(folder: &Path, role: &str) -> Self {
        let discovery = format!("file:{}", folder.display());
        let flags = [
            "--role",
            role,
            "--backend",
            "cpu",
            "--discovery",
            &discovery,
            "--max-num-seqs",
            "4",
            "--max-model-len",
            "4096",
            "--grace-period",
            "0.2",
        ];
        let command = Command::new(env!("CARGO_BIN_EXE_kimi-linear-worker"))
            .args(flags)
            .env("DYN_LOG", "warn")
            .spawn();
        Self(command.unwrap())
    }

    fn terminate(&self) {
        let pid = self.0.id().to_string();
        let killed = Command::new("kill").args(["-TERM", &pid]).status();
        assert!(killed.unwrap().success());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A worker as discovery knows it.
#[derive(Clone, Debug)]
struct Found {
    id: u64,
    component: String,
    registration: Registration,
    bootstrap: Option<(String, u16)>,
}

/// This test's place in the cluster.
struct Cluster {
    folder: TempDir,
    runtime: DistributedRuntime,
}

impl Cluster {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Selector::File(folder.path().to_owned());
        let config = DistributedConfig {
            discovery_backend: DiscoveryBackend::KvStore(store),
            nats_config: None,
            request_plane: RequestPlaneMode::Tcp,
            response_plane: Some(ResponsePlaneMode::Tcp),
            event_transport_kind: EventTransportKind::Zmq,
        };
        let runtime = Runtime::from_current().unwrap();
        let runtime = DistributedRuntime::new(runtime, config).await.unwrap();
        Self { folder, runtime }
    }

    fn start(&self, role: &str) -> Process {
        Process::start(self.folder.path(), role)
    }

    /// The workers whose model is in discovery.
    async fn workers(&self) -> Vec<Found> {
        let discovery = self.runtime.discovery();
        let models = discovery.list(DiscoveryQuery::AllModels).await.unwrap();
        let found = models.into_iter().filter_map(|model| match model {
            DiscoveryInstance::Model {
                component,
                instance_id,
                card_json,
                ..
            } => Some(found(component, instance_id, &card_json)),
            _ => None,
        });
        found.collect()
    }

    /// Waits for a worker of this role, with its endpoint.
    async fn worker(&self, role: Role) -> (Found, Router) {
        let begun = Instant::now();
        loop {
            let workers = self.workers().await;
            let found = workers
                .into_iter()
                .find(|found| found.registration.role == role);
            if let Some(found) = found {
                let router = self.router(&found.component).await;
                while !router.client.is_instance_live(found.id) {
                    assert!(begun.elapsed() < PATIENCE, "no endpoint of {found:?}");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                return (found, router);
            }
            assert!(begun.elapsed() < PATIENCE, "no {role} worker");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn router(&self, component: &str) -> Router {
        let namespace = self.runtime.namespace(NAMESPACE).unwrap();
        let endpoint = namespace.component(component).unwrap().endpoint("generate");
        let client = endpoint.client().await.unwrap();
        let router = Router::from_client_no_fault_detection(client, RouterMode::RoundRobin);
        router.await.unwrap()
    }
}

fn found(component: String, id: u64, card: &Value) -> Found {
    let config = &card["runtime_config"];
    let data = serde_json::from_value(config["runtime_data"].clone()).unwrap();
    let endpoint = &config["disaggregated_endpoint"];
    let host = endpoint["bootstrap_host"].as_str();
    let port = endpoint["bootstrap_port"].as_u64();
    Found {
        id,
        component,
        registration: Registration::of(&data).unwrap(),
        bootstrap: host
            .zip(port)
            .map(|(host, port)| (host.to_owned(), port as u16)),
    }
}

/// A prompt of this many tokens.
fn request(seed: u32, tokens: u32, max_tokens: usize) -> Request {
    Request {
        sampling: Sampling {
            temperature: 0.8,
            seed: u64::from(seed),
            ..Sampling::GREEDY
        },
        ..Request::new(
            (0..tokens)
                .map(|i| (i * 7 + seed * 13) % 900 + 40)
                .collect(),
            max_tokens,
        )
    }
}

/// What one engine answers to these requests.
fn reference(requests: &[Request]) -> Vec<Vec<u32>> {
    let files = LlmFiles::demo().unwrap();
    let backend = backend::open(BackendKind::Cpu, None).unwrap();
    let options = LlmOptions::one(4096);
    let llm = files
        .load(backend, &options, &mut |_, _| {
            std::ops::ControlFlow::Continue(())
        })
        .unwrap();
    let answer = |request: &Request| {
        let answer = llm.engine().answer(request.clone());
        let mut tokens = Vec::new();
        while let Some(event) = answer.next() {
            match event {
                Event::Token { id, .. } => tokens.push(id),
                Event::Failed(error) => panic!("{error}"),
                _ => {}
            }
        }
        tokens
    };
    requests.iter().map(answer).collect()
}

fn routed(request: &Request, bootstrap: Option<BootstrapInfo>) -> PreprocessedRequest {
    let mut routed = wire::preprocessed(MODEL, request).unwrap();
    routed.bootstrap_info = bootstrap;
    routed
}

/// The tokens of an answer, and why it ended.
async fn answer(
    router: &Router,
    worker: u64,
    request: PreprocessedRequest,
) -> Result<(Vec<u32>, FinishReason), String> {
    let (mut tokens, mut reader) = (Vec::new(), ChunkReader::new(0, request.token_ids.len()));
    let stream = router.direct(Context::new(request), worker).await;
    let mut stream = stream.map_err(|error| format!("{error:#}"))?;
    let mut ended = None;
    while let Some(item) = stream.next().await {
        if let Some(error) = item.error {
            return Err(error.to_string());
        }
        let Some(chunk) = item.data else { continue };
        ended = chunk.finish_reason.clone().or(ended);
        for event in reader.read(chunk).map_err(|error| error.to_string())? {
            if let Event::Token { id, .. } = event {
                tokens.push(id);
            }
        }
    }
    Ok((tokens, ended.ok_or("the stream has no end")?))
}

/// The chunks of a response.
async fn chunks(
    router: &Router,
    worker: u64,
    request: PreprocessedRequest,
) -> Vec<LLMEngineOutput> {
    let stream = router.direct(Context::new(request), worker).await.unwrap();
    let items = stream.map(|item| {
        assert!(item.error.is_none(), "{item:?}");
        item.data
    });
    items
        .collect::<Vec<_>>()
        .await
        .into_iter()
        .flatten()
        .collect()
}

/// One request as Dynamo's prefill router sends it: to both workers, with a room for its caches.
async fn apart(
    request: &Request,
    room: u64,
    prefill: (&Found, &Router),
    decode: (&Found, &Router),
) -> Vec<u32> {
    let (host, port) = prefill.0.bootstrap.clone().unwrap();
    let bootstrap = BootstrapInfo {
        bootstrap_host: host,
        bootstrap_port: port,
        bootstrap_room: room,
        handoff_id: None,
    };
    let mut first = routed(request, Some(bootstrap.clone()));
    first.stop_conditions.max_tokens = Some(1);
    let first = answer(prefill.1, prefill.0.id, first);
    let second = answer(decode.1, decode.0.id, routed(request, Some(bootstrap)));
    let (first, second) = tokio::join!(first, second);
    let (prefilled, ended) = first.unwrap();
    assert_eq!((prefilled.len(), ended), (1, FinishReason::Length));
    let (tokens, _) = second.unwrap();
    assert_eq!(tokens[0], prefilled[0]);
    tokens
}

async fn order(control: &str, role: Role) -> Value {
    let url = format!("{control}/engine/update/role");
    let client = reqwest::Client::new();
    let body = json!({ "role": role }).to_string();
    let answer = client.post(url).body(body).send().await.unwrap();
    let text = answer.text().await.unwrap();
    serde_json::from_str(&text).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn prefill_and_decode_apart_answer_as_one_engine_and_roles_change_under_load() {
    let requests: Vec<Request> = (0..6)
        .map(|seed| request(seed, 40 + 90 * seed, 24))
        .collect();
    let expected = reference(&requests);
    let cluster = Cluster::new().await;
    let (_first, _second) = (cluster.start("prefill"), cluster.start("decode"));
    let (prefill, prefill_router) = cluster.worker(Role::Prefill).await;
    let (decode, decode_router) = cluster.worker(Role::Decode).await;
    assert_eq!(prefill.registration.cluster, wire::LOCAL);
    let answers = requests.iter().zip(0..).map(|(request, room)| {
        let (prefill, decode) = ((&prefill, &prefill_router), (&decode, &decode_router));
        apart(request, room, prefill, decode)
    });
    assert_eq!(futures::future::join_all(answers).await, expected);

    // A router that knows no rooms tells the decode worker afterwards where the caches are.
    let mut first = routed(&requests[2], None);
    first.stop_conditions.max_tokens = Some(1);
    let chunks = chunks(&prefill_router, prefill.id, first).await;
    let [chunk] = &chunks[..] else {
        panic!("a prefill has one chunk: {chunks:?}");
    };
    let mut second = routed(&requests[2], None);
    second.prefill_result = Some(PrefillResult {
        disaggregated_params: chunk.disaggregated_params.clone().unwrap(),
        prompt_tokens_details: None,
    });
    let told = answer(&decode_router, decode.id, second).await.unwrap();
    assert_eq!(told.0, expected[2]);

    // What no worker can answer is refused at once.
    let empty = routed(&Request::new(Vec::new(), 1), None);
    let error = answer(&decode_router, decode.id, empty).await.unwrap_err();
    assert!(error.contains("the prompt is empty"), "{error}");

    // The prefill worker becomes a decode worker while it answers: both answers come to their end.
    let control = prefill.registration.control.clone().unwrap();
    let long = request(9, 300, 200);
    let expected_long = reference(std::slice::from_ref(&long)).remove(0);
    let prefill_pair = (&prefill, &prefill_router);
    let answered = apart(&long, 99, prefill_pair, (&decode, &decode_router));
    let (answered, ordered) = tokio::join!(answered, async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        order(&control, Role::Decode).await
    });
    assert_eq!(ordered["status"], "accepted", "{ordered}");
    assert_eq!(answered, expected_long);
    let begun = Instant::now();
    let changed = loop {
        let workers = cluster.workers().await;
        let same = workers.into_iter().filter(|found| found.id == prefill.id);
        if let [found] = &same.collect::<Vec<_>>()[..]
            && found.registration.role == Role::Decode
        {
            break found.clone();
        }
        assert!(begun.elapsed() < PATIENCE, "the role did not change");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let router = cluster.router(&changed.component).await;
    while !router.client.is_instance_live(changed.id) {
        assert!(begun.elapsed() < PATIENCE, "no endpoint in the new role");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Nobody prefills for it: it does so itself.
    let (tokens, _) = answer(&router, changed.id, routed(&requests[3], None))
        .await
        .unwrap();
    assert_eq!(tokens, expected[3]);
    assert_eq!(order(&control, Role::Decode).await["status"], "ok");
    let health = reqwest::get(format!("{control}/health")).await.unwrap();
    assert!(health.status().is_success(), "{health:?}");
    let metrics = reqwest::get(format!("{control}/metrics")).await.unwrap();
    let metrics = metrics.text().await.unwrap();
    // The metrics of the earlier role are not told a second time.
    let heads = metrics.matches("# TYPE vllm:num_requests_running").count();
    assert_eq!(heads, 1, "{metrics}");
    assert!(metrics.contains("outcome=\"completed\"} 8"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migrated_answer_goes_on_where_it_was_cut() {
    let whole = request(3, 150, 40);
    let expected = reference(std::slice::from_ref(&whole)).remove(0);
    let cluster = Cluster::new().await;
    let _worker = cluster.start("both");
    let (worker, router) = cluster.worker(Role::Both).await;
    // As Dynamo sends it after a worker was lost: with what was answered, and room for the rest.
    let mut rest = routed(&whole, None);
    let cut = 15;
    Arc::make_mut(&mut rest.token_ids).extend(&expected[..cut]);
    rest.stop_conditions.max_tokens = Some((40 - cut) as u32);
    let (tokens, ended) = answer(&router, worker.id, rest).await.unwrap();
    assert_eq!(tokens, expected[cut..]);
    assert_eq!(ended, FinishReason::Length);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_lets_answers_finish() {
    let long = request(5, 60, 400);
    let expected = reference(std::slice::from_ref(&long)).remove(0);
    let cluster = Cluster::new().await;
    let mut process = cluster.start("both");
    let (worker, router) = cluster.worker(Role::Both).await;
    let answered = answer(&router, worker.id, routed(&long, None));
    let (answered, ()) = tokio::join!(answered, async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        process.terminate();
    });
    let (tokens, _) = answered.unwrap();
    assert_eq!(tokens, expected);
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = process.0.try_wait().unwrap() {
            break status;
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "it does not end");
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert!(status.success(), "{status}");
    assert!(cluster.workers().await.is_empty());
}
