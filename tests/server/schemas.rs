//! Faults in the schemas of answers and of tools' arguments: what is held, what is checked afterwards, what is refused.

use serde_json::{Value, json};

use super::faults::{CHAT, TEXT, chat, tool};
use super::harness::{Setup, json_of, merge, refusal, start};

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_do_not_follow_their_schema_are_marked_and_counted() {
    let server = start().await;
    let pair = |unique: bool| json!({ "type": "array", "items": { "enum": [1] }, "minItems": 2, "maxItems": 2, "uniqueItems": unique });
    let schema = |unique: bool| json!({ "type": "object", "properties": { "x": pair(unique) }, "required": ["x"], "additionalProperties": false });
    let format = |unique: bool| json!({ "response_format": { "type": "json_schema", "json_schema": { "name": "x", "schema": schema(unique) } }, "max_tokens": 200 });
    let call = |unique: bool| json!({ "tools": [tool("f", schema(unique))], "tool_choice": "required", "parallel_tool_calls": false, "max_tokens": 200 });
    let violations = async || server.metric("kimi_linear:schema_violations_total").await;
    for (body, place) in [(format(false), None), (call(false), None)] {
        let response = server.send(CHAT, &chat(body)).await;
        let found = response.headers().get("x-schema-violation");
        assert_eq!(found.map(|value| value.to_str().unwrap()), place);
        json_of(response).await;
    }
    assert_eq!(violations().await, 0.0);
    for (i, (body, place)) in [
        (format(true), "`/x`: "),
        (call(true), "arguments of `f`: `/x`: "),
    ]
    .into_iter()
    .enumerate()
    {
        let response = server.send(CHAT, &chat(body)).await;
        let found = response.headers()["x-schema-violation"].to_str().unwrap();
        assert!(found.starts_with(place), "{found}");
        let (status, answer) = json_of(response).await;
        // The answer is sent all the same.
        assert_eq!(status, 200, "{answer}");
        assert_eq!(violations().await, (i + 1) as f64);
    }
    let stream = server.stream(CHAT, chat(format(true))).await;
    assert!(stream.done);
    assert_eq!(violations().await, 3.0);
    let mut text = format(true);
    merge(&mut text, json!({ "prompt": "Hi" }));
    let response = server.send(TEXT, &text).await;
    assert!(response.headers().contains_key("x-schema-violation"));
    // An answer that was cut is not JSON yet, which is no violation.
    let mut cut = format(true);
    cut["max_tokens"] = json!(2);
    let response = server.send(CHAT, &chat(cut)).await;
    assert!(!response.headers().contains_key("x-schema-violation"));
}

#[tokio::test(flavor = "multi_thread")]
async fn schemas_are_held_as_far_as_they_can_be() {
    let server = start().await;
    for unheld in [
        json!({ "type": "string", "format": "path" }),
        json!({ "type": "string", "format": "binary" }),
        json!({ "type": "array", "items": { "enum": [1] }, "uniqueItems": true, "maxItems": 2 }),
        json!({ "not": { "type": "string" }, "enum": [1, 2] }),
        json!({ "enum": [1], "if": { "const": 1 }, "then": { "type": "integer" } }),
        json!({ "type": "object", "propertyNames": { "pattern": "^a" }, "maxProperties": 0 }),
        json!({ "type": "string", "pattern": "^(?!no).*$", "maxLength": 3 }),
        json!({ "oneOf": [{ "enum": [1, 2] }, { "enum": [2, 3] }] }),
    ] {
        let schema = json!({ "type": "object", "properties": { "x": unheld }, "required": ["x"] });
        let tools = json!([tool("f", schema.clone())]);
        for more in [
            json!({ "parallel_tool_calls": false }),
            json!({ "tool_choice": "required" }),
            json!({ "response_format": { "type": "json_object" } }),
        ] {
            let mut body = chat(more);
            body["tools"] = tools.clone();
            server.ok(CHAT, body).await;
        }
        let format =
            json!({ "type": "json_schema", "json_schema": { "name": "x", "schema": schema } });
        let body = chat(json!({ "response_format": format, "max_tokens": 60 }));
        let answer = server.ok(CHAT, body).await;
        let choice = &answer["choices"][0];
        if choice["finish_reason"] == "stop" {
            let text = choice["message"]["content"].as_str().unwrap();
            let value: Value = serde_json::from_str(text).unwrap();
            assert!(value.get("x").is_some(), "{text}");
        }
    }
    // What cannot be held at all is named, with the tool and the path, and without the grammar.
    let wrong = json!({ "type": "object", "properties": { "list": { "type": "array", "items": { "type": "no such type" } } } });
    let mut strict = tool("fine.one", wrong.clone());
    let body = |tools: Value| chat(json!({ "tools": tools, "tool_choice": "required" }));
    server
        .ok(
            CHAT,
            body(json!([tool("f", json!({ "type": "object" })), strict])),
        )
        .await;
    strict["function"]["strict"] = json!(true);
    let found = server
        .post(
            CHAT,
            body(json!([tool("f", json!({ "type": "object" })), strict])),
        )
        .await;
    let message = refusal(&found, 400, Some("tools[1].function.parameters"));
    assert!(
        message.contains("`fine.one`") && message.contains("`properties.list.items`"),
        "{message}"
    );
    for source in ["section", "%json", "lark", "INDEX"] {
        assert!(!message.contains(source), "{message}");
    }
    server.assert_empty().await;
}

/// A schema that no value follows is refused by name before anything is generated; one that only recurses is held.
#[tokio::test(flavor = "multi_thread")]
async fn schemas_may_refer_to_themselves() {
    let server = start().await;
    let format = |schema: &Value| json!({ "type": "json_schema", "json_schema": { "name": "x", "schema": schema } });
    let around = json!({ "$defs": { "a": { "$ref": "#/$defs/b" }, "b": { "$ref": "#/$defs/a" } }, "$ref": "#/$defs/a" });
    for endless in [json!({ "$ref": "#" }), around] {
        let body = chat(json!({ "response_format": format(&endless) }));
        let message = refusal(&server.post(CHAT, body).await, 400, Some("response_format"));
        assert!(message.contains("refers to itself"), "{message}");
        assert!(
            !message.contains("grammar") && !message.contains('\n'),
            "{message}"
        );
    }
    let endless = json!({ "type": "object", "properties": { "list": { "items": { "$ref": "#/properties/list/items" } } } });
    let mut strict = tool("loops", endless);
    let body = |tool: &Value| chat(json!({ "tools": [tool], "tool_choice": "required" }));
    server.ok(CHAT, body(&strict)).await;
    strict["function"]["strict"] = json!(true);
    let found = server.post(CHAT, body(&strict)).await;
    let message = refusal(&found, 400, Some("tools[0].function.parameters"));
    assert!(
        message.contains("`loops`") && message.contains("`properties.list.items`"),
        "{message}"
    );
    let tree = json!({ "type": "object", "properties": { "next": { "anyOf": [{ "$ref": "#" }, { "type": "null" }] } }, "required": ["next"] });
    let body =
        json!({ "response_format": format(&tree), "max_tokens": 400, "temperature": 2, "seed": 1 });
    let answer = server.ok(CHAT, chat(body)).await;
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "stop", "{choice}");
    let text = choice["message"]["content"].as_str().unwrap();
    let mut value: Value = serde_json::from_str(text).unwrap();
    while !value.is_null() {
        assert_eq!(value.as_object().unwrap().len(), 1, "{text}");
        value = value["next"].take();
    }
    server.assert_empty().await;
}

/// Patterns for keys are compared pair by pair: four hundred longer ones took twenty seconds.
#[tokio::test(flavor = "multi_thread")]
async fn schemas_that_compile_for_long_are_not_compiled() {
    let server = Setup::default().context(8000).start().await;
    let patterns = (0..250).map(|i| (format!("^a{i}$"), json!({})));
    let heavy = json!({ "type": "object", "patternProperties": Value::Object(patterns.collect()) });
    let format = json!({ "type": "json_schema", "json_schema": { "name": "x", "schema": heavy } });
    let found = server
        .post(CHAT, chat(json!({ "response_format": format })))
        .await;
    assert!(refusal(&found, 400, Some("response_format")).contains("too many"));
    let mut heavy = tool("heavy", heavy);
    let body = |tool: &Value| chat(json!({ "tools": [tool], "tool_choice": "required" }));
    server.ok(CHAT, body(&heavy)).await;
    heavy["function"]["strict"] = json!(true);
    let found = server.post(CHAT, body(&heavy)).await;
    assert!(refusal(&found, 400, Some("tools[0].function.parameters")).contains("`heavy`"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_has_the_properties_that_its_schema_lists() {
    let server = start().await;
    let schema = json!({ "type": "object", "properties": { "a": { "enum": [1] }, "b": { "enum": [2] } }, "required": ["a"] });
    for draw in 0..4 {
        let format =
            json!({ "type": "json_schema", "json_schema": { "name": "x", "schema": schema } });
        let body = chat(
            json!({ "response_format": format, "max_tokens": 120, "temperature": 2, "seed": draw }),
        );
        let answer = server.ok(CHAT, body).await;
        let choice = &answer["choices"][0];
        assert_eq!(choice["finish_reason"], "stop", "{choice}");
        let text = choice["message"]["content"].as_str().unwrap();
        let value: Value = serde_json::from_str(text).unwrap();
        let keys: Vec<&String> = value.as_object().unwrap().keys().collect();
        assert!(
            keys.iter().all(|key| ["a", "b"].contains(&key.as_str())),
            "{text}"
        );
    }
}
