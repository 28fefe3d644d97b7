//! Anthropic's Messages API: forms, streams, what its histories become, and what is refused.

use serde_json::{Value, json};

use super::events::{named, names};
use super::harness::{Running, Setup, json_of, merge, start};

const PATH: &str = "/v1/messages";
const COUNT: &str = "/v1/messages/count_tokens";

fn hello(more: Value) -> Value {
    let mut body = json!({
        "model": "model",
        "max_tokens": 8,
        "temperature": 0,
        "messages": [{ "role": "user", "content": "Hello" }],
    });
    merge(&mut body, more);
    body
}

/// Asserts an error in Anthropic's form, and returns its message.
#[track_caller]
fn refusal(found: &(u16, Value), status: u16, kind: &str) -> String {
    let (code, body) = found;
    assert_eq!(*code, status, "{body}");
    assert_eq!(body["type"], "error", "{body}");
    assert_eq!(body["error"]["type"], kind, "{body}");
    assert!(body["request_id"].is_string(), "{body}");
    body["error"]["message"].as_str().unwrap().to_owned()
}

fn weather() -> Value {
    json!({
        "name": "get_weather",
        "description": "The weather of a city",
        "input_schema": {
            "type": "object",
            "properties": { "city": { "enum": ["Paris", "Rome"] } },
            "required": ["city"],
            "additionalProperties": false,
        },
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_is_the_one_that_a_chat_gets() {
    let server = start().await;
    let message = server.ok(PATH, hello(json!({}))).await;
    let chat = server.chat("Hello", json!({})).await;
    let choice = &chat["choices"][0];
    assert_eq!(message["type"], "message");
    assert_eq!(message["role"], "assistant");
    assert!(message["id"].as_str().unwrap().starts_with("msg_"));
    let text = json!([{ "type": "text", "text": choice["message"]["content"] }]);
    assert_eq!(message["content"], text);
    let reason = if choice["finish_reason"] == "length" {
        "max_tokens"
    } else {
        "end_turn"
    };
    assert_eq!(message["stop_reason"], reason);
    assert_eq!(message["stop_sequence"], Value::Null);
    let usage = &message["usage"];
    let prompt = usage["input_tokens"].as_u64().unwrap()
        + usage["cache_read_input_tokens"].as_u64().unwrap();
    assert_eq!(prompt, chat["usage"]["prompt_tokens"]);
    assert_eq!(usage["output_tokens"], chat["usage"]["completion_tokens"]);
    let count = server
        .ok(COUNT, json!({ "messages": hello(json!({}))["messages"] }))
        .await;
    assert_eq!(count, json!({ "input_tokens": prompt }));
    server.assert_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_has_anthropics_events_and_says_what_a_whole_answer_says() {
    let server = start().await;
    let whole = server.ok(PATH, hello(json!({}))).await;
    let events = named(&server, PATH, hello(json!({}))).await;
    let names = names(&events);
    assert_eq!(names[..3], ["message_start", "ping", "content_block_start"]);
    assert_eq!(
        names[names.len() - 3..],
        ["content_block_stop", "message_delta", "message_stop"]
    );
    let deltas = names.iter().filter(|name| **name == "content_block_delta");
    assert_eq!(deltas.count(), names.len() - 6);
    let message = &events[0].1["message"];
    assert_eq!(message["content"], json!([]));
    assert_eq!(message["stop_reason"], Value::Null);
    let text: String = events
        .iter()
        .filter_map(|(_, event)| event["delta"]["text"].as_str())
        .collect();
    assert_eq!(whole["content"][0]["text"], text);
    let end = &events[events.len() - 2].1;
    assert_eq!(end["delta"]["stop_reason"], whole["stop_reason"]);
    assert_eq!(
        end["usage"]["output_tokens"],
        whole["usage"]["output_tokens"]
    );
    // The second time the prompt comes from the cache.
    let read = end["usage"]["cache_read_input_tokens"].as_u64().unwrap();
    assert_eq!(
        end["usage"]["input_tokens"].as_u64().unwrap() + read,
        message["usage"]["input_tokens"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_sequence_is_told() {
    let server = start().await;
    let long = hello(
        json!({ "max_tokens": 60, "messages": [{ "role": "user", "content": "Reverse: key, lamp, pear." }] }),
    );
    let whole = server.ok(PATH, long.clone()).await;
    let text = whole["content"][0]["text"].as_str().unwrap();
    let stop: String = text.chars().skip(2).take(2).collect();
    let mut body = long;
    body["stop_sequences"] = json!(["never in it", stop]);
    let cut = server.ok(PATH, body.clone()).await;
    assert_eq!(cut["stop_reason"], "stop_sequence");
    assert_eq!(cut["stop_sequence"], *stop);
    let before = text.split(&stop).next().unwrap();
    assert_eq!(
        cut["content"][0]["text"].as_str().unwrap_or_default(),
        before
    );
    let events = named(&server, PATH, body).await;
    let end = &events[events.len() - 2].1["delta"];
    assert_eq!(end["stop_sequence"], *stop);
}

#[tokio::test(flavor = "multi_thread")]
async fn tools_are_called_and_their_results_taken() {
    let server = start().await;
    let asked = hello(json!({
        "max_tokens": 300,
        "tools": [weather()],
        "tool_choice": { "type": "any", "disable_parallel_tool_use": true },
    }));
    let message = server.ok(PATH, asked.clone()).await;
    assert_eq!(message["stop_reason"], "tool_use");
    let blocks = message["content"].as_array().unwrap();
    assert_eq!(blocks.len(), 1, "{message}");
    assert_eq!(blocks[0]["type"], "tool_use");
    assert_eq!(blocks[0]["name"], "get_weather");
    let city = blocks[0]["input"]["city"].as_str().unwrap();
    assert!(["Paris", "Rome"].contains(&city));
    let events = named(&server, PATH, asked.clone()).await;
    let begun = &events[2].1["content_block"];
    assert_eq!(begun["id"], blocks[0]["id"]);
    assert_eq!(begun["input"], json!({}));
    let arguments: String = events
        .iter()
        .filter_map(|(_, event)| event["delta"]["partial_json"].as_str())
        .collect();
    let arguments: Value = serde_json::from_str(&arguments).unwrap();
    assert_eq!(arguments, blocks[0]["input"]);
    // The history is the one that a chat has with the same messages.
    let result = json!({
        "type": "tool_result", "tool_use_id": blocks[0]["id"], "content": [{ "type": "text", "text": "Sunny" }],
    });
    let messages = json!([
        { "role": "user", "content": "Hello" },
        { "role": "assistant", "content": [
            { "type": "thinking", "thinking": "Which city?", "signature": "x" },
            { "type": "text", "text": "Let me see." },
            blocks[0],
        ] },
        { "role": "user", "content": [result, { "type": "text", "text": "And?", "cache_control": { "type": "ephemeral" } }] },
    ]);
    let count = json!({ "system": [{ "type": "text", "text": "Be brief." }], "messages": messages, "tools": [weather()] });
    let counted = server.ok(COUNT, count).await;
    let call = json!({
        "id": blocks[0]["id"],
        "type": "function",
        "function": { "name": "get_weather", "arguments": blocks[0]["input"].to_string() },
    });
    let function = json!({
        "name": "get_weather",
        "description": weather()["description"],
        "parameters": weather()["input_schema"],
    });
    let chat = json!({ "tools": [{ "type": "function", "function": function }], "messages": [
        { "role": "system", "content": "Be brief." },
        { "role": "user", "content": "Hello" },
        { "role": "assistant", "content": "Let me see.", "reasoning_content": "Which city?", "tool_calls": [call] },
        { "role": "tool", "tool_call_id": blocks[0]["id"], "content": "Sunny" },
        { "role": "user", "content": "And?" },
    ]});
    assert_eq!(
        counted["input_tokens"],
        server.ok("/tokenize", chat).await["count"]
    );
    let mut none = asked;
    none["tool_choice"] = json!({ "type": "none" });
    none["max_tokens"] = json!(8);
    let message = server.ok(PATH, none).await;
    assert_ne!(message["stop_reason"], "tool_use");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_the_client_began_is_gone_on_with() {
    let server = start().await;
    let whole = server.ok(PATH, hello(json!({ "max_tokens": 12 }))).await;
    let text = whole["content"][0]["text"].as_str().unwrap();
    // Where a token may end: the prompt's tokens are then those of the answer.
    let first = server.ids(text)[0];
    let begun = server.tokenizer.decode(&[first]).unwrap();
    let body = hello(json!({ "max_tokens": 11, "messages": [
        { "role": "user", "content": "Hello" },
        { "role": "assistant", "content": begun },
    ]}));
    let rest = server.ok(PATH, body).await;
    assert_eq!(
        format!("{begun}{}", rest["content"][0]["text"].as_str().unwrap()),
        text
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_may_be_as_long_as_there_is_room_for() {
    let server = Setup::default().context(64).start().await;
    let body = hello(json!({ "max_tokens": 4096, "ignore_eos": true }));
    let message = server.ok(PATH, body).await;
    assert_eq!(message["stop_reason"], "model_context_window_exceeded");
    let form = json!({ "output_config": { "format": { "type": "json_schema", "schema": { "enum": ["yes", "no"] } } } });
    let message = server.ok(PATH, hello(form)).await;
    let text = message["content"][0]["text"].as_str().unwrap();
    assert!(["\"yes\"", "\"no\""].contains(&text.trim()), "{text}");
}

async fn refused(server: &Running, more: Value) -> String {
    let found = server.post(PATH, hello(more)).await;
    refusal(&found, 400, "invalid_request_error")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_refused_by_name() {
    let server = start().await;
    let said = |content: Value| json!({ "messages": [{ "role": "user", "content": content }] });
    let image = json!([{ "type": "text", "text": "See" }, { "type": "image", "source": { "type": "base64", "media_type": "image/png", "data": "" } }]);
    for (more, named) in [
        (said(image), "messages[0].content[1]"),
        (said(json!([{ "type": "hologram" }])), "hologram"),
        (
            said(json!([{ "type": "thinking", "thinking": "x" }])),
            "messages[0].content[0]",
        ),
        (said(json!([])), "messages[0].content"),
        (said(json!(5)), "messages[0].content"),
        (json!({ "messages": [] }), "messages"),
        (
            json!({ "messages": [{ "role": "tool", "content": "x" }] }),
            "messages[0].role",
        ),
        (json!({ "max_tokens": 0 }), "max_tokens"),
        (json!({ "max_tokens": null }), "max_tokens"),
        (json!({ "temperature": 3 }), "temperature"),
        (json!({ "stop_sequences": [""] }), "stop_sequences"),
        (json!({ "n": 2 }), "n"),
        (
            json!({ "tools": [{ "type": "web_search_20250305", "name": "web_search" }] }),
            "web_search_20250305",
        ),
        (
            json!({ "tools": [{ "name": "f" }] }),
            "tools[0].input_schema",
        ),
        (json!({ "tool_choice": { "type": "any" } }), "tool_choice"),
        (
            json!({ "tool_choice": { "type": "tool", "name": "f" } }),
            "tool_choice",
        ),
        (json!({ "mcp_servers": [{}] }), "mcp_servers"),
        (json!({ "container": "x" }), "container"),
        (
            json!({ "context_management": { "edits": [{ "type": "clear_tool_uses_20250919" }] } }),
            "clear_tool_uses",
        ),
        (json!({ "no_field": 1 }), "no_field"),
    ] {
        let message = refused(&server, more.clone()).await;
        assert!(message.contains(named), "{more}: {message}");
    }
    let found = server.post(PATH, hello(json!({ "model": "other" }))).await;
    assert!(refusal(&found, 404, "not_found_error").contains("other"));
    // What clients send beside, and what changes nothing.
    let harmless = json!({
        "metadata": { "user_id": "x" }, "service_tier": "auto", "thinking": { "type": "enabled", "budget_tokens": 1024 },
        "system": "Hi", "top_k": 5, "top_p": 0.9, "cache_control": null, "inference_geo": null, "tools": [],
        "context_management": { "edits": [{ "type": "clear_thinking_20251015", "keep": "all" }] },
    });
    server.ok(PATH, hello(harmless)).await;
    server.assert_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_and_versions_are_anthropics() {
    let mut setup = Setup::default();
    setup.options.api_keys = vec!["secret".to_owned()];
    let server = setup.start().await;
    let found = server.post(PATH, hello(json!({}))).await;
    refusal(&found, 401, "authentication_error");
    let send = async |key: &str, version: &str| {
        let request = server.client.post(format!("{}{PATH}", server.url));
        let request = request
            .header("x-api-key", key)
            .header("anthropic-version", version);
        request.json(&hello(json!({}))).send().await.unwrap()
    };
    let found = send("wrong", "2023-06-01").await;
    refusal(&json_of(found).await, 401, "authentication_error");
    let found = json_of(send("secret", "2023-01-01").await).await;
    assert!(refusal(&found, 400, "invalid_request_error").contains("2023-06-01"));
    assert_eq!(send("secret", "2026-10-21").await.status(), 200);
    let answered = send("secret", "2023-06-01").await;
    assert_eq!(answered.status(), 200);
    let id = answered.headers()["request-id"].clone();
    assert_eq!(answered.headers()["x-request-id"], id);
}
