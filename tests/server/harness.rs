//! A server inside the test, and a client for it.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kimi_linear::backend::BackendKind;
use kimi_linear::connector::{Connector, KvTransfer};
use kimi_linear::engine::{EngineHandle, EngineOptions, EngineSizes, Status};
use kimi_linear::llm::{Llm, LlmFiles, LlmOptions};
use kimi_linear::server::{Opener, Server, ServerOptions};
use kimi_linear::tokenizer::Tokenizer;
use reqwest::{Client, Response};
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// The model that all of this runs on.
pub fn model_dir() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/assets/demo"))
}

/// What a server is made with.
pub struct Setup {
    pub sizes: EngineSizes,
    pub engine: EngineOptions,
    pub options: ServerOptions,
    /// The folder of the model.
    pub model: PathBuf,
    /// Its part in transfers of caches.
    pub transfers: Option<KvTransfer>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            sizes: EngineSizes {
                sequences: 8,
                context: 2048,
                prefill_chunk: 256,
                scored: 64,
                checkpoints: 8,
                blocks: None,
                speculative: 0,
            },
            engine: EngineOptions {
                host_bytes: 64 << 20,
                ..EngineOptions::default()
            },
            options: ServerOptions::new("model"),
            model: model_dir(),
            transfers: None,
        }
    }
}

impl Setup {
    pub fn sequences(mut self, sequences: usize) -> Self {
        self.sizes.sequences = sequences;
        self
    }

    pub fn context(mut self, context: usize) -> Self {
        self.sizes.context = context;
        self
    }

    fn llm(&self) -> Llm {
        let options = LlmOptions {
            sizes: self.sizes,
            cache: None,
            engine: self.engine,
        };
        let backend = kimi_linear::backend::open(BackendKind::Cpu, None).unwrap();
        let files = LlmFiles::open(&self.model).unwrap();
        let load = files.load(backend, &options, &mut |_, _| ControlFlow::Continue(()));
        load.unwrap()
    }

    /// Starts a server that is still loading, and what makes it ready.
    pub async fn listen(self) -> (Running, Opener, Llm, Option<Connector>) {
        let llm = self.llm();
        let mut transfers = None;
        if let Some(config) = self.transfers {
            transfers = Some(Connector::start(llm.engine(), config).await.unwrap());
        }
        let transfer_port = transfers.as_ref().and_then(Connector::port);
        let server = Server::bind(("127.0.0.1", 0), self.options).await.unwrap();
        let opener = server.opener();
        let (stop, stopped) = oneshot::channel();
        let url = server.url();
        let task = tokio::spawn(server.run(async {
            let _ = stopped.await;
        }));
        let running = Running {
            url,
            transfer_port,
            engine: llm.engine().clone(),
            tokenizer: Arc::clone(&llm.files().tokenizer),
            apart: Apart::default(),
            stop: Some(stop),
            task,
            client: Client::builder().no_proxy().build().unwrap(),
        };
        (running, opener, llm, transfers)
    }

    /// Starts a server whose tasks run apart from the test's, so that it can be killed.
    pub async fn start_apart(self) -> Running {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let mut running = runtime.spawn(self.start()).await.unwrap();
        running.apart = Apart(Mutex::new(Some(runtime)));
        running
    }

    pub async fn start(self) -> Running {
        let (running, opener, llm, transfers) = self.listen().await;
        opener.open(llm.into(), transfers).unwrap();
        running
    }
}

pub async fn start() -> Running {
    Setup::default().start().await
}

/// A server that runs.
pub struct Running {
    pub url: String,
    /// Where it sends caches from.
    pub transfer_port: Option<u16>,
    pub engine: EngineHandle,
    pub tokenizer: Arc<Tokenizer>,
    pub client: Client,
    apart: Apart,
    stop: Option<oneshot::Sender<()>>,
    pub task: JoinHandle<()>,
}

/// A server's own runtime.
#[derive(Default)]
struct Apart(Mutex<Option<tokio::runtime::Runtime>>);

impl Apart {
    fn end(&self) {
        if let Some(runtime) = self.0.lock().unwrap().take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for Apart {
    fn drop(&mut self) {
        self.end();
    }
}

/// A stream's chunks.
#[derive(Debug, Default)]
pub struct Chunks {
    pub chunks: Vec<Value>,
    pub done: bool,
}

impl Chunks {
    /// The text of one choice.
    pub fn text(&self, index: usize) -> String {
        let choices = self.choices(index);
        let text = |choice: &Value| {
            let text = choice["text"]
                .as_str()
                .or(choice["delta"]["content"].as_str());
            text.unwrap_or_default().to_owned()
        };
        choices.iter().map(text).collect()
    }

    pub fn choices(&self, index: usize) -> Vec<Value> {
        let choices = self
            .chunks
            .iter()
            .flat_map(|chunk| chunk["choices"].as_array().unwrap());
        choices
            .filter(|choice| choice["index"] == index)
            .cloned()
            .collect()
    }

    pub fn reason(&self, index: usize) -> Value {
        self.choices(index).last().unwrap()["finish_reason"].clone()
    }
}

impl Running {
    pub fn address(&self) -> &str {
        self.url.trim_start_matches("http://")
    }

    pub async fn get(&self, path: &str) -> (u16, Value) {
        let response = self
            .client
            .get(format!("{}{path}", self.url))
            .send()
            .await
            .unwrap();
        json_of(response).await
    }

    pub async fn send(&self, path: &str, body: &Value) -> Response {
        let request = self.client.post(format!("{}{path}", self.url));
        request.json(body).send().await.unwrap()
    }

    pub async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        json_of(self.send(path, &body).await).await
    }

    /// The answer; `None` where the server is gone.
    pub async fn try_post(&self, path: &str, body: &Value) -> Option<(u16, Value)> {
        let request = self.client.post(format!("{}{path}", self.url));
        let response = request.json(body).send().await.ok()?;
        let status = response.status().as_u16();
        let text = response.text().await.ok()?;
        Some((status, serde_json::from_str(&text).unwrap()))
    }

    /// Ends it as a killed process ends: nothing is finished, and nobody is told.
    pub fn kill(&self) {
        self.apart.end();
    }

    pub async fn get_text(&self, path: &str) -> String {
        let response = self.client.get(format!("{}{path}", self.url)).send().await;
        response.unwrap().text().await.unwrap()
    }

    pub async fn raw(&self, path: &str, body: impl Into<reqwest::Body>) -> (u16, Value) {
        let request = self.client.post(format!("{}{path}", self.url));
        json_of(request.body(body).send().await.unwrap()).await
    }

    /// Asserts success.
    #[track_caller]
    pub fn ok(&self, path: &'static str, body: Value) -> impl Future<Output = Value> + '_ {
        let caller = std::panic::Location::caller();
        async move {
            let (status, answer) = self.post(path, body).await;
            assert_eq!(status, 200, "{caller}: {answer}");
            answer
        }
    }

    pub async fn chat(&self, text: &str, more: Value) -> Value {
        let mut body = json!({ "messages": [{ "role": "user", "content": text }], "temperature": 0, "max_tokens": 8 });
        merge(&mut body, more);
        self.ok("/v1/chat/completions", body).await
    }

    pub async fn stream(&self, path: &str, mut body: Value) -> Chunks {
        body["stream"] = json!(true);
        let response = self.send(path, &body).await;
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        chunks(&response.text().await.unwrap())
    }

    pub async fn metric(&self, name: &str) -> f64 {
        let text = self
            .client
            .get(format!("{}/metrics", self.url))
            .send()
            .await
            .unwrap();
        metric(&text.text().await.unwrap(), name)
    }

    pub async fn status(&self) -> Status {
        let engine = self.engine.clone();
        tokio::task::spawn_blocking(move || engine.status().unwrap())
            .await
            .unwrap()
    }

    /// Waits until nothing runs or waits, and asserts that nothing is held but what the cache holds, and nothing at all
    /// without that.
    pub async fn assert_empty(&self) {
        self.settle().await;
        let pools = self.status().await.occupancy;
        assert_eq!(pools.slots, pools.idle_slots, "{pools:?}");
        assert_eq!(pools.blocks, pools.idle_blocks, "{pools:?}");
        let engine = self.engine.clone();
        tokio::task::spawn_blocking(move || engine.clear_cache().unwrap())
            .await
            .unwrap();
        let pools = self.status().await.occupancy;
        assert_eq!(
            (pools.slots, pools.blocks, pools.host_bytes),
            (0, 0, 0),
            "{pools:?}"
        );
    }

    /// Waits until nothing runs or waits. What is cancelled goes at the next step, so a few questions are enough; the
    /// bound is only there to fail.
    pub async fn settle(&self) {
        for _ in 0..10_000 {
            let status = self.status().await;
            if status.running + status.waiting == 0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        panic!("something still runs: {:?}", self.status().await);
    }

    /// Begins to shut down.
    pub fn shut_down(&mut self) {
        let _ = self.stop.take().unwrap().send(());
    }

    pub fn ids(&self, text: &str) -> Vec<u32> {
        self.tokenizer.encode_ordinary(text).unwrap()
    }
}

pub fn merge(body: &mut Value, more: Value) {
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
}

pub async fn json_of(response: Response) -> (u16, Value) {
    let status = response.status().as_u16();
    let text = response.text().await.unwrap();
    let value =
        serde_json::from_str(&text).unwrap_or_else(|_| panic!("{status}: not JSON: {text:?}"));
    (status, value)
}

/// The events of a stream.
pub fn chunks(text: &str) -> Chunks {
    let mut found = Chunks::default();
    for event in text.split("\n\n").filter(|event| !event.trim().is_empty()) {
        let Some(data) = event.strip_prefix("data: ") else {
            assert!(event.starts_with(':'), "{event:?}");
            continue;
        };
        assert!(!found.done, "something after the end: {data}");
        if data == "[DONE]" {
            found.done = true;
        } else {
            found.chunks.push(serde_json::from_str(data).unwrap());
        }
    }
    found
}

/// A metric's value, its labels aside.
pub fn metric(text: &str, name: &str) -> f64 {
    let line = text
        .lines()
        .find(|line| line.starts_with(name) && line[name.len()..].starts_with(['{', ' ']));
    let line = line.unwrap_or_else(|| panic!("no metric {name} in {text}"));
    line.rsplit_once(' ').unwrap().1.parse().unwrap()
}

/// Asserts an error in OpenAI's form, and returns its message.
#[track_caller]
pub fn refusal(found: &(u16, Value), status: u16, param: Option<&str>) -> String {
    let (code, body) = found;
    assert_eq!(*code, status, "{body}");
    let error = &body["error"];
    let message = error["message"].as_str().unwrap_or_default();
    assert!(!message.is_empty(), "{body}");
    assert!(error["type"].is_string(), "{body}");
    if let Some(param) = param {
        assert_eq!(error["param"], param, "{body}");
    }
    message.to_owned()
}

/// Ids of a choice.
pub fn ids_of(choice: &Value) -> Vec<u32> {
    serde_json::from_value(choice["token_ids"].clone()).unwrap()
}

/// A chat's request with ids in its answer.
pub fn greedy_chat(messages: &[Value], max_tokens: usize) -> Value {
    json!({
        "messages": messages,
        "temperature": 0,
        "max_tokens": max_tokens,
        "return_token_ids": true,
    })
}
