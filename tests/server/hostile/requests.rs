//! Requests that are HTTP, and that nobody should send.

use std::sync::Arc;
use std::time::Duration;

use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{RngSeed, TestRunner};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use reqwest::{Method, Response};
use serde_json::{Value, json};

use super::target::Target;
use crate::fuzz::requests::request;

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

/// Reads an answer, or a refusal with a reason.
async fn outcome(response: Response, sent: &Value) {
    let (status, text) = (response.status().as_u16(), response.text().await.unwrap());
    assert!(
        status == 200 || (400..500).contains(&status),
        "{status} to {sent}: {text}"
    );
    assert!(
        status == 200 || text.contains("message"),
        "{status} without a reason: {text}"
    );
}

/// The requests that are drawn for the server inside the test.
pub async fn drawn(target: Arc<Target>, seed: u64) {
    // A strategy is not to be held over an await.
    let bodies: Vec<(&str, Value)> = {
        let config = proptest::test_runner::Config {
            rng_seed: RngSeed::Fixed(seed),
            ..Default::default()
        };
        let (mut runner, strategy) = (TestRunner::new(config), request());
        (0..100)
            .map(|_| strategy.new_tree(&mut runner).unwrap().current())
            .collect()
    };
    let client = Target::client();
    for (path, body) in bodies {
        outcome(
            target.post(&client, path, &body).send().await.unwrap(),
            &body,
        )
        .await;
    }
}

/// Schemas and grammars that are wrong, deep, large, or take long to compile.
pub async fn schemas(target: Arc<Target>) {
    let object =
        |name: &str, value: Value| json!({ "type": "object", "properties": { name: value } });
    let mut deep = json!({ "type": "string" });
    for _ in 0..40 {
        deep = object("a", deep);
    }
    let patterns = (0..250).map(|at| (format!("^a{at}$"), json!({})));
    let alike = (0..20)
        .map(|at| json!({ "type": "string", "pattern": format!("^(a|b)*{at}(a|b){{20}}$") }));
    let schemas = [
        deep,
        json!({ "$ref": "#" }),
        json!({ "$defs": { "a": { "$ref": "#/$defs/b" }, "b": { "$ref": "#/$defs/a" } }, "$ref": "#/$defs/a" }),
        json!({ "type": "object", "patternProperties": Value::Object(patterns.collect()) }),
        json!({ "type": "string", "pattern": "^((a{1,100}){1,100}){1,100}$" }),
        json!({ "type": "string", "pattern": "(" }),
        json!({ "enum": (0..20_000).map(|at| format!("value {at}")).collect::<Vec<_>>() }),
        json!({ "anyOf": alike.collect::<Vec<_>>() }),
        json!({ "type": "array", "minItems": 1_000_000, "items": {} }),
        json!({ "type": "no such type" }),
    ];
    let client = Target::client();
    let formats = schemas.into_iter().map(|schema| {
        json!({ "response_format": { "type": "json_schema", "json_schema": { "name": "x", "schema": schema } } })
    });
    let others = [
        json!({ "structured_outputs": { "regex": "(a|aa)*(b" } }),
        json!({ "structured_outputs": { "regex": "(.*){1000}x{1000}" } }),
        json!({ "structured_outputs": { "grammar": "start: start start | \"a\"" } }),
        json!({ "structured_outputs": { "grammar": "start: nowhere" } }),
        json!({ "structured_outputs": { "choice": vec!["x"; 10_000] } }),
    ];
    for more in formats.chain(others) {
        let mut body =
            json!({ "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 4 });
        crate::harness::merge(&mut body, more);
        outcome(
            target.post(&client, CHAT, &body).send().await.unwrap(),
            &body,
        )
        .await;
    }
}

/// Whole answers that nobody waits for.
pub async fn cancelled(target: Arc<Target>, seed: u64) {
    let mut draw = SmallRng::seed_from_u64(seed);
    let clients = (0..30).map(|_| {
        let (target, patience) = (Arc::clone(&target), Duration::from_millis(draw.random_range(0..200)));
        async move {
            let client = Target::client();
            let body = json!({ "prompt": "Once upon a time", "max_tokens": 1900, "ignore_eos": true, "n": 2 });
            let sent = target.post(&client, TEXT, &body).send();
            let _ = tokio::time::timeout(patience, sent).await;
        }
    });
    futures_util::future::join_all(clients).await;
}

/// More answers than run at once, and more than can ever wait.
pub async fn large_batches(target: Arc<Target>) {
    let client = Target::client();
    let prompts: Vec<String> = (0..200).map(|at| format!("Prompt {at}")).collect();
    for (body, status) in [
        (
            json!({ "prompt": "Once", "n": 128, "max_tokens": 2, "temperature": 1 }),
            200,
        ),
        (json!({ "prompt": prompts, "max_tokens": 1 }), 200),
        (json!({ "prompt": vec!["Hi"; 5000], "max_tokens": 1 }), 400),
        (
            json!({ "prompt": vec!["Hi"; 100_000], "max_tokens": 1 }),
            400,
        ),
    ] {
        let response = target.post(&client, TEXT, &body).send().await.unwrap();
        let (found, text) = (response.status(), response.text().await.unwrap());
        assert_eq!(found, status, "{text}");
    }
}

/// Other methods, paths, hosts, types of content and keys.
pub async fn wrong_paths_and_keys(target: Arc<Target>) {
    let client = Target::client();
    let body = json!({ "prompt": "Once", "max_tokens": 1 });
    for (method, path, status) in [
        (Method::DELETE, TEXT, 405),
        (Method::PATCH, TEXT, 405),
        (Method::GET, TEXT, 405),
        (Method::POST, "/v1/embeddings", 400),
        (Method::POST, "/../../etc/passwd", 404),
        (Method::GET, "/v1/responses/resp_%00", 404),
        (Method::GET, "/nowhere?%ff=%00", 404),
    ] {
        let request = target.request(&client, method.clone(), path).json(&body);
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), status, "{method} {path}");
    }
    for key in ["", "Bearer ", "Bearer wrong", "Basic YTpi"] {
        let url = format!("{}{TEXT}", target.url);
        let response = client
            .post(url)
            .header("authorization", key)
            .json(&body)
            .send()
            .await
            .unwrap();
        assert_eq!(response.status(), 401, "{key:?}");
    }
    let typed = target.request(&client, Method::POST, TEXT);
    let typed = typed.header("content-type", "text/html");
    let response = typed.body(body.to_string()).send().await.unwrap();
    assert_eq!(response.status(), 415);
}
