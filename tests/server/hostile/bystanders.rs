//! Clients that behave, and that must not notice the others.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use reqwest::Client;
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

use super::target::Target;
use crate::harness::chunks;

/// Between two requests of one client.
const PAUSE: Duration = Duration::from_millis(50);

/// A request and its answer.
type Known = (&'static str, Value, String);

/// A request for each protocol: greedy and drawn, whole and streamed, free and held to a schema.
fn asked() -> Vec<(&'static str, Value)> {
    let boxes = "The red box holds 7. The blue box holds 2. Now the red box holds 3. What does the red box hold?";
    let messages = json!([{ "role": "user", "content": boxes }]);
    let shape = json!({ "type": "object", "properties": { "colour": { "enum": ["red", "blue"] } }, "required": ["colour"] });
    let format =
        json!({ "type": "json_schema", "json_schema": { "name": "box", "schema": shape } });
    vec![
        (
            "/v1/chat/completions",
            json!({ "messages": messages, "temperature": 0, "max_tokens": 16, "return_token_ids": true }),
        ),
        (
            "/v1/chat/completions",
            json!({ "messages": messages, "temperature": 0, "max_tokens": 16, "stream": true }),
        ),
        (
            "/v1/chat/completions",
            json!({ "messages": messages, "temperature": 0, "max_tokens": 60, "response_format": format }),
        ),
        (
            "/v1/completions",
            json!({ "prompt": "Once upon a time", "temperature": 1, "seed": 7, "max_tokens": 24, "return_token_ids": true }),
        ),
        (
            "/v1/messages",
            json!({ "messages": messages, "temperature": 0, "max_tokens": 16 }),
        ),
        (
            "/v1/responses",
            json!({ "input": boxes, "temperature": 0, "max_output_tokens": 16, "store": false }),
        ),
    ]
}

/// What an answer says, without ids and times.
fn said(path: &str, text: &str) -> String {
    if text.starts_with("data:") {
        let chunks = chunks(text);
        return format!("{} {}", chunks.text(0), chunks.reason(0));
    }
    let answer: Value = serde_json::from_str(text).unwrap();
    let said = match path {
        "/v1/messages" => &answer["content"],
        "/v1/responses" => &answer["output"][0]["content"],
        _ => &answer["choices"],
    };
    assert!(!said.is_null(), "{path}: {answer}");
    said.to_string()
}

async fn answer(target: &Target, client: &Client, path: &str, body: &Value) -> String {
    let response = target.post(client, path, body).send().await.unwrap();
    let (status, text) = (response.status(), response.text().await.unwrap());
    assert_eq!(status, 200, "a bystander's {path} {body}: {text}");
    said(path, &text)
}

/// The answers of a server that does nothing else, each asked for twice.
pub async fn known(target: &Target) -> Vec<Known> {
    let (client, mut known) = (Target::client(), Vec::new());
    for (path, body) in asked() {
        let said = answer(target, &client, path, &body).await;
        assert_eq!(answer(target, &client, path, &body).await, said);
        known.push((path, body, said));
    }
    known
}

/// Clients that go on until they are stopped.
pub struct Bystanders {
    over: Arc<AtomicBool>,
    clients: Vec<JoinHandle<usize>>,
}

impl Bystanders {
    /// A client for each of the known answers.
    pub fn start(runtime: &Runtime, target: &Arc<Target>, known: Vec<Known>) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let clients = known.into_iter().map(|(path, body, expected)| {
            let (over, target) = (Arc::clone(&over), Arc::clone(target));
            runtime.spawn(async move {
                let (client, mut answers) = (Target::client(), 0);
                while !over.load(Ordering::Relaxed) {
                    let found = answer(&target, &client, path, &body).await;
                    assert_eq!(found, expected, "{path} {body}");
                    answers += 1;
                    tokio::time::sleep(PAUSE).await;
                }
                answers
            })
        });
        Self {
            over: Arc::clone(&over),
            clients: clients.collect(),
        }
    }

    /// Stops them; the number of their answers, all of which were right.
    pub fn stop(self, runtime: &Runtime) -> usize {
        self.over.store(true, Ordering::Relaxed);
        let answers = runtime.block_on(futures_util::future::join_all(self.clients));
        answers
            .into_iter()
            .map(|answers| answers.expect("a bystander's answer changed"))
            .sum()
    }
}
