//! Answers of a given form: JSON by a schema, and tool calls.

use serde_json::{Value, json};

use super::harness::{Running, refusal, start};

fn weather(strict: bool) -> Value {
    json!({ "type": "function", "function": {
        "name": "get.weather-now",
        "description": "The weather of a city.",
        "strict": strict,
        "parameters": {
            "type": "object",
            "properties": {
                "city": { "enum": ["Paris", "Rome"] },
                "days": { "type": "integer", "minimum": 1, "maximum": 9 },
            },
            "required": ["city", "days"],
            "additionalProperties": false,
        },
    }})
}

fn other() -> Value {
    json!({ "type": "function", "function": { "name": "clock", "parameters": { "type": "object", "properties": {}, "additionalProperties": false } } })
}

fn schema(schema: Value) -> Value {
    json!({ "response_format": { "type": "json_schema", "json_schema": { "name": "it", "strict": true, "schema": schema } } })
}

fn content(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().unwrap()
}

/// Greedy, and drawn with two seeds: a form holds whatever the model likes.
async fn three(server: &Running, more: Value) -> Vec<Value> {
    let mut answers = Vec::new();
    for draw in [
        json!({}),
        json!({ "temperature": 2, "seed": 1 }),
        json!({ "temperature": 2, "seed": 2 }),
    ] {
        let mut body = json!({ "max_tokens": 400 });
        super::harness::merge(&mut body, more.clone());
        super::harness::merge(&mut body, draw);
        answers.push(server.chat("Tell me.", body).await);
    }
    answers
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_follow_their_schema() {
    let server = start().await;
    let object = json!({
        "type": "object",
        "properties": {
            "name": { "type": "string", "maxLength": 12 },
            "kind": { "enum": ["a", "b", null] },
            "counts": { "type": "array", "items": { "type": "integer", "minimum": 0, "maximum": 99 }, "maxItems": 3 },
            "nested": { "type": "object", "properties": { "flag": { "type": "boolean" } }, "required": ["flag"], "additionalProperties": false },
        },
        "required": ["name", "kind", "counts", "nested"],
        "additionalProperties": false,
    });
    for answer in three(&server, schema(object)).await {
        assert_eq!(answer["choices"][0]["finish_reason"], "stop", "{answer}");
        let value: Value = serde_json::from_str(content(&answer)).unwrap();
        assert!(value["name"].as_str().unwrap().chars().count() <= 12);
        assert!([json!("a"), json!("b"), Value::Null].contains(&value["kind"]));
        let counts = value["counts"].as_array().unwrap();
        assert!(
            counts.len() <= 3
                && counts
                    .iter()
                    .all(|count| (0..100).contains(&count.as_i64().unwrap()))
        );
        assert!(value["nested"]["flag"].is_boolean());
        assert_eq!(value.as_object().unwrap().len(), 4);
    }
    // Any object: it may not come to its end, but it begins as one.
    for answer in three(
        &server,
        json!({ "response_format": { "type": "json_object" } }),
    )
    .await
    {
        let text = content(&answer);
        assert!(text.trim_start().starts_with('{'), "{text}");
        if answer["choices"][0]["finish_reason"] == "stop" {
            assert!(serde_json::from_str::<Value>(text).unwrap().is_object());
        }
    }
    // Several answers are each held to it.
    let mut body = schema(json!({ "enum": ["yes", "no"] }));
    super::harness::merge(
        &mut body,
        json!({ "n": 4, "temperature": 2, "seed": 3, "max_tokens": 20 }),
    );
    let answer = server.chat("Well?", body).await;
    for choice in answer["choices"].as_array().unwrap() {
        let text = choice["message"]["content"].as_str().unwrap();
        assert!(["\"yes\"", "\"no\""].contains(&text.trim()), "{text}");
    }
    server.assert_empty().await;
}

/// The one call of an answer, checked against the schema.
#[track_caller]
fn call(message: &Value) -> Value {
    let calls = message["tool_calls"].as_array().unwrap();
    assert_eq!(calls.len(), 1, "{message}");
    let call = &calls[0];
    assert_eq!(call["type"], "function");
    let id = call["id"].as_str().unwrap();
    let name = call["function"]["name"].as_str().unwrap();
    // The id as the model wrote it.
    let index = id
        .strip_prefix("functions.")
        .and_then(|id| id.strip_prefix(name))
        .unwrap();
    assert!(
        index
            .strip_prefix(':')
            .unwrap()
            .bytes()
            .all(|byte| byte.is_ascii_digit()),
        "{id}"
    );
    let arguments: Value =
        serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
    if name == "get.weather-now" {
        assert!(["Paris", "Rome"].contains(&arguments["city"].as_str().unwrap()));
        assert!((1..10).contains(&arguments["days"].as_i64().unwrap()));
    }
    call.clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tool_is_called_and_answered() {
    let server = start().await;
    let named = json!({ "type": "function", "function": { "name": "get.weather-now" } });
    let tools = json!([weather(false), other()]);
    for choice in [named, json!("required")] {
        let body = json!({ "tools": tools, "tool_choice": choice, "parallel_tool_calls": false });
        for answer in three(&server, body).await {
            let choice = &answer["choices"][0];
            assert_eq!(choice["finish_reason"], "tool_calls", "{answer}");
            assert_eq!(choice["message"]["content"], Value::Null);
            call(&choice["message"]);
        }
    }
    // Streamed, the same: pieces of arguments, and the id and name once.
    let body = json!({
        "messages": [{ "role": "user", "content": "Tell me." }],
        "temperature": 0, "max_tokens": 400, "tools": tools, "parallel_tool_calls": false,
        "tool_choice": { "type": "function", "function": { "name": "get.weather-now" } },
    });
    let whole = server.ok("/v1/chat/completions", body.clone()).await;
    let whole = call(&whole["choices"][0]["message"]);
    let stream = server.stream("/v1/chat/completions", body.clone()).await;
    assert_eq!(stream.reason(0), "tool_calls");
    let choices = stream.choices(0);
    let deltas: Vec<&Value> = choices
        .iter()
        .filter_map(|choice| choice["delta"]["tool_calls"].get(0))
        .collect();
    assert_eq!(deltas[0]["id"], whole["id"]);
    assert_eq!(deltas[0]["function"]["name"], "get.weather-now");
    assert!(
        deltas[1..]
            .iter()
            .all(|delta| delta["id"].is_null() && delta["index"] == 0)
    );
    assert!(deltas.len() > 3, "arguments come in pieces");
    let arguments: String = deltas
        .iter()
        .map(|delta| delta["function"]["arguments"].as_str().unwrap())
        .collect();
    assert_eq!(whole["function"]["arguments"], arguments);
    // And back: the call and the tool's answer are part of the next prompt, and what was read before is not read again.
    let first = server.ok("/v1/chat/completions", body.clone()).await;
    let mut next = body;
    let messages = next["messages"].as_array_mut().unwrap();
    messages.push(first["choices"][0]["message"].clone());
    messages.push(json!({ "role": "tool", "tool_call_id": whole["id"], "content": "Sunny" }));
    next["tool_choice"] = json!("none");
    next["max_tokens"] = json!(8);
    let second = server.ok("/v1/chat/completions", next).await;
    let cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
        .as_u64()
        .unwrap();
    assert!(cached >= first["usage"]["prompt_tokens"].as_u64().unwrap());
    server.assert_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tool_may_be_forbidden_or_left_to_the_model() {
    let server = start().await;
    let begin = server
        .tokenizer
        .special_id("<|tool_calls_section_begin|>")
        .unwrap();
    // A model that would always call.
    let eager = json!({ begin.to_string(): 100 });
    let body = json!({ "tools": [weather(true)], "logit_bias": eager, "max_tokens": 300 });
    let mut none = body.clone();
    none["tool_choice"] = json!("none");
    let answer = server.chat("Tell me.", none).await;
    assert!(
        answer["choices"][0]["message"].get("tool_calls").is_none(),
        "{answer}"
    );
    // Left to it, a strict function's arguments are held to their schema: the bias calls, the grammar does the rest.
    let answer = server.chat("Tell me.", body).await;
    let message = &answer["choices"][0]["message"];
    for call in message["tool_calls"].as_array().unwrap() {
        let arguments = call["function"]["arguments"].as_str().unwrap();
        if answer["choices"][0]["finish_reason"] == "tool_calls" {
            assert!(serde_json::from_str::<Value>(arguments).unwrap()["city"].is_string());
        }
    }
    // Either a call or an answer by the schema.
    let mut body = schema(json!({ "enum": ["neither"] }));
    super::harness::merge(
        &mut body,
        json!({ "tools": [other()], "max_tokens": 100, "parallel_tool_calls": false }),
    );
    for answer in three(&server, body).await {
        let message = &answer["choices"][0]["message"];
        match message["content"].as_str() {
            Some(text) => assert_eq!(text.trim(), "\"neither\""),
            None => assert_eq!(call(message)["function"]["name"], "clock"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_form_that_cannot_be_is_refused() {
    let server = start().await;
    let chat = |more: Value| {
        let mut body =
            json!({ "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 4 });
        super::harness::merge(&mut body, more);
        body
    };
    let long = "x".repeat(257);
    for (more, param) in [
        (
            json!({ "response_format": { "type": "xml" } }),
            "response_format",
        ),
        (
            json!({ "response_format": { "type": "json_schema" } }),
            "response_format.json_schema",
        ),
        (json!({ "response_format": "json" }), "response_format"),
        (schema(json!(5)), "response_format.json_schema"),
        (schema(json!({ "type": "no such type" })), "response_format"),
        (
            schema(json!({ "type": "string", "pattern": "(" })),
            "response_format",
        ),
        (
            schema(json!({ "$ref": "http://example.org/elsewhere" })),
            "response_format",
        ),
        (
            schema(json!({ "type": "object", "required": ["a"], "properties": { "a": false } })),
            "response_format",
        ),
        (json!({ "tools": [5] }), "tools[0]"),
        (
            json!({ "tools": [{ "type": "retrieval", "function": { "name": "x" } }] }),
            "tools[0].type",
        ),
        (
            json!({ "tools": [{ "type": "function", "function": { "name": "" } }] }),
            "tools[0].function.name",
        ),
        (
            json!({ "tools": [{ "type": "function", "function": { "name": long } }] }),
            "tools[0].function.name",
        ),
        (
            json!({ "tools": [{ "type": "function", "function": { "name": "x", "colour": 1 } }] }),
            "tools[0].function.colour",
        ),
        (json!({ "tools": [other(), other()] }), "tools"),
        (json!({ "tool_choice": "required" }), "tool_choice"),
        (
            json!({ "tools": [other()], "tool_choice": "sometimes" }),
            "tool_choice",
        ),
        (
            json!({ "tools": [other()], "tool_choice": { "type": "function", "function": { "name": "nobody" } } }),
            "tool_choice",
        ),
        (
            json!({ "response_format": { "type": "json_object" }, "ignore_eos": true }),
            "ignore_eos",
        ),
        (json!({ "functions": [] }), "functions"),
    ] {
        let found = server
            .post("/v1/chat/completions", chat(more.clone()))
            .await;
        assert_eq!(found.0, 400, "{more}");
        refusal(&found, 400, Some(param));
    }
    server.assert_empty().await;
}
