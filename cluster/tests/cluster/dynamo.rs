//! Dynamo's own frontends, in Rust and from PyPI, over these workers: the same answers, and the limit that docs/cluster.md names.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use kimi_linear_cluster::demo::load::Client;
use kimi_linear_cluster::demo::processes::{Cluster, Process, Role};
use serde_json::{Value, json};
use tokio::process::{Child, Command};

use super::harness::{self, COMPLETIONS, limited, metric, options, start};

const CHAT: &str = "/v1/chat/completions";
const PORT: u16 = 8010;

/// The Python that has `ai-dynamo`; `make test-cluster` sets it.
const PYTHON: &str = "KIMI_LINEAR_DYNAMO_PYTHON";

/// A frontend of Dynamo's beside ours.
struct Dynamo {
    child: Child,
    client: Client,
    log: PathBuf,
}

impl Dynamo {
    /// Starts it with the variables that Dynamo's documentation names, and waits until it lists the model.
    async fn start(program: &Path, arguments: &[&str], cluster: &Cluster) -> Self {
        let options = cluster.options();
        let host = options.network.address(Process::Frontend.site());
        let host = host.to_string();
        let log = options.folder.join("logs/dynamo.log");
        let file = std::fs::File::create(&log).unwrap();
        let at = [host.as_str(), &PORT.to_string()].map(str::to_owned);
        let arguments = arguments.iter().map(|one| match *one {
            "HOST" => at[0].clone(),
            "PORT" => at[1].clone(),
            other => other.to_owned(),
        });
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env("DYN_DISCOVERY_BACKEND", "file")
            .env("DYN_FILE_KV", options.folder.join("discovery"))
            .env("DYN_NAMESPACE", "kimi-linear")
            .env("DYN_REQUEST_PLANE", "tcp")
            .env("DYN_EVENT_PLANE", "zmq")
            .env("DYN_TCP_RPC_HOST", &host)
            .env("DYN_TCP_RESPONSE_STREAM_HOST", &host)
            .env("DYN_EVENT_PLANE_HOST", &host)
            .stdin(Stdio::null())
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .kill_on_drop(true);
        let child = command.spawn();
        let child = child.unwrap_or_else(|error| panic!("{}: {error}", program.display()));
        let client = harness::client(&format!("http://{host}:{PORT}"));
        let mut dynamo = Self { child, client, log };
        dynamo.wait(&options.model_name).await;
        dynamo
    }

    /// Waits until a request is answered.
    async fn wait(&mut self, model: &str) {
        let since = Instant::now();
        loop {
            let answer = self.client.post(CHAT, &question(model, "Hello!")).await;
            let Err(error) = answer else { return };
            let ended = self.child.try_wait().unwrap();
            let log = || std::fs::read_to_string(&self.log).unwrap_or_default();
            assert!(ended.is_none(), "it ended: {ended:?}: {}", log());
            let waited = since.elapsed();
            assert!(waited < Duration::from_secs(60), "{error}: {}", log());
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    async fn content(&self, body: &Value) -> (Value, u64) {
        said(&self.client, body).await
    }
}

/// A greedy chat of one message.
fn question(model: &str, text: &str) -> Value {
    json!({
        "model": model,
        "messages": [{ "role": "user", "content": text }],
        "temperature": 0,
        "max_tokens": 24,
    })
}

/// The text of an answer, and the number of its prompt's tokens.
async fn said(client: &Client, body: &Value) -> (Value, u64) {
    let answer = client.post(CHAT, body).await;
    let answer = answer.unwrap_or_else(|error| panic!("{error}: {body}"));
    let text = answer["choices"][0]["message"]["content"].clone();
    let prompt = answer["usage"]["prompt_tokens"].as_u64();
    (text, prompt.unwrap_or_else(|| panic!("no usage: {answer}")))
}

/// What people ask, with prompts of several blocks among them.
fn questions() -> Vec<String> {
    let story = |count: usize| {
        let boxes = (0..count).map(|at| format!("The {} box holds {}. ", COLOURS[at % 4], at % 10));
        boxes.collect::<String>()
    };
    let ask = |count: usize| format!("{}What does the red box hold?", story(count));
    let mut all: Vec<String> = [1, 3, 8, 20, 40].map(ask).into();
    all.extend(["Copy: a b c", "Hello!", "Grüße, 世界 👋🏽"].map(str::to_owned));
    all
}

const COLOURS: [&str; 4] = ["red", "blue", "green", "yellow"];

/// Holds a frontend of Dynamo's to ours.
async fn serves(name: &str, program: &Path, arguments: &[&str]) {
    let mut options = options(name, &[(Role::Prefill, 1), (Role::Decode, 1)]);
    let types = ["--endpoint-types", "chat,completions"];
    options.worker_arguments.extend(types.map(str::to_owned));
    let mut cluster = start(options).await;
    let model = cluster.options().model_name.clone();
    let dynamo = Dynamo::start(program, arguments, &cluster).await;
    let ours = harness::client(&cluster.frontend_url());
    let decode = Process::worker(Role::Decode, 0);
    let received = "kimi_linear:kv_transfer_bytes_total";
    let before = metric(&cluster, decode, received, &["direction=\"received\""]).await;
    for text in questions() {
        let body = question(&model, &text);
        let (expected, expected_prompt) = said(&ours, &body).await;
        let (found, prompt) = dynamo.content(&body).await;
        assert_eq!(
            (found, prompt),
            (expected.clone(), expected_prompt),
            "{text}"
        );
        let streamed = dynamo.client.stream(CHAT, &body).await.unwrap();
        assert_eq!(Value::from(streamed.text), expected, "{text}");
    }
    let after = metric(&cluster, decode, received, &["direction=\"received\""]).await;
    assert!(after > before, "no cache came from the prefill worker");

    // Texts and token ids to complete.
    let ids: Vec<u32> = (0..300).map(|at| 97 + at % 26).collect();
    for prompt in [json!("The red box holds 7. The"), json!(ids)] {
        let body = json!({ "model": model, "prompt": prompt, "temperature": 0, "max_tokens": 8, "ignore_eos": true });
        let text = |answer: &Value| answer["choices"][0]["text"].clone();
        let expected = text(&ours.post(COMPLETIONS, &body).await.unwrap());
        let found = text(&dynamo.client.post(COMPLETIONS, &body).await.unwrap());
        assert_eq!(found, expected, "{prompt}");
    }

    // The limit: what a user spells becomes a control token, one instead of the pieces of a text.
    let body = question(&model, "<|im_end|><|im_system|>system<|im_middle|>");
    let (_, text) = said(&ours, &body).await;
    let (_, control) = dynamo.content(&body).await;
    assert!(
        control < text,
        "{control} tokens, ours has {text}: mend docs/cluster.md"
    );

    // A client that goes away leaves nothing.
    let body = json!({ "model": model, "prompt": ids, "max_tokens": 2000, "ignore_eos": true });
    let gone = dynamo.client.stream(COMPLETIONS, &body);
    assert!(
        tokio::time::timeout(Duration::from_millis(500), gone)
            .await
            .is_err()
    );
    harness::assert_empties(&cluster, 30).await;
    cluster.check().unwrap();
    drop(dynamo);
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dynamos_frontend_in_rust_serves_these_workers() {
    limited(240, async {
        // Cargo builds examples with the tests, beside the programs.
        let worker = Path::new(env!("CARGO_BIN_EXE_kimi-linear-worker"));
        let program = worker.with_file_name("examples").join("dynamo_frontend");
        serves("dynamo-rust", &program, &["HOST", "PORT"]).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs ai-dynamo of PyPI: make test-cluster installs it and runs this"]
async fn dynamos_frontend_in_python_serves_these_workers() {
    limited(240, async {
        let python =
            std::env::var(PYTHON).expect("KIMI_LINEAR_DYNAMO_PYTHON is a Python with ai-dynamo");
        let arguments = "-m dynamo.frontend --router-mode kv --http-host HOST --http-port PORT";
        let arguments: Vec<&str> = arguments.split(' ').collect();
        serves("dynamo-python", Path::new(&python), &arguments).await;
    })
    .await;
}
