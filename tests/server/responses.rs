//! OpenAI's Responses API: forms, streams, what is kept, and what is refused.

use serde_json::{Value, json};

use super::events::{named, names};
use super::harness::{Setup, merge, refusal, start};

const PATH: &str = "/v1/responses";

fn hello(more: Value) -> Value {
    let mut body =
        json!({ "model": "model", "max_output_tokens": 8, "temperature": 0, "input": "Hello" });
    merge(&mut body, more);
    body
}

fn text(response: &Value) -> &str {
    let item = &response["output"][0];
    assert_eq!(item["type"], "message", "{response}");
    item["content"][0]["text"].as_str().unwrap()
}

fn weather() -> Value {
    json!({
        "type": "function",
        "name": "get_weather",
        "strict": true,
        "parameters": {
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
    let response = server
        .ok(PATH, hello(json!({ "metadata": { "a": "b" } })))
        .await;
    let chat = server.chat("Hello", json!({})).await;
    assert_eq!(response["object"], "response");
    assert!(response["id"].as_str().unwrap().starts_with("resp_"));
    assert_eq!(text(&response), chat["choices"][0]["message"]["content"]);
    let cut = chat["choices"][0]["finish_reason"] == "length";
    assert_eq!(
        response["status"],
        if cut { "incomplete" } else { "completed" }
    );
    let details = cut.then(|| json!({ "reason": "max_output_tokens" }));
    assert_eq!(response["incomplete_details"], json!(details));
    for (ours, theirs) in [
        ("input_tokens", "prompt_tokens"),
        ("output_tokens", "completion_tokens"),
        ("total_tokens", "total_tokens"),
    ] {
        assert_eq!(response["usage"][ours], chat["usage"][theirs], "{ours}");
    }
    for (field, told) in [
        ("metadata", json!({ "a": "b" })),
        ("temperature", json!(0.0)),
        ("max_output_tokens", json!(8)),
        ("store", json!(true)),
        ("text", json!({ "format": { "type": "text" } })),
        ("error", Value::Null),
    ] {
        assert_eq!(response[field], told, "{field}");
    }
    server.assert_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_has_numbered_events_and_says_what_a_whole_answer_says() {
    let server = start().await;
    let logprobs = json!({ "include": ["message.output_text.logprobs"], "top_logprobs": 2 });
    let whole = server.ok(PATH, hello(logprobs.clone())).await;
    let events = named(&server, PATH, hello(logprobs)).await;
    for (number, (_, event)) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], number);
    }
    let names = names(&events);
    let begin = [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ];
    assert_eq!(names[..4], begin);
    let last = format!("response.{}", whole["status"].as_str().unwrap());
    let end = [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        &last,
    ];
    assert_eq!(names[names.len() - 4..], end);
    let deltas: Vec<&Value> = events[4..events.len() - 4]
        .iter()
        .map(|(_, event)| event)
        .collect();
    assert!(
        names[4..names.len() - 4]
            .iter()
            .all(|name| *name == "response.output_text.delta")
    );
    let said: String = deltas
        .iter()
        .map(|delta| delta["delta"].as_str().unwrap())
        .collect();
    assert_eq!(said, text(&whole));
    let done = &events[events.len() - 4].1;
    assert_eq!(done["text"], *said);
    let entries = whole["output"][0]["content"][0]["logprobs"]
        .as_array()
        .unwrap();
    assert_eq!(
        entries.len() as u64,
        whole["usage"]["output_tokens"].as_u64().unwrap()
    );
    assert_eq!(entries[0]["top_logprobs"].as_array().unwrap().len(), 2);
    assert_eq!(done["logprobs"], json!(entries));
    let item = &events[events.len() - 2].1["item"];
    assert_eq!(item["content"], whole["output"][0]["content"]);
    let response = &events.last().unwrap().1["response"];
    assert_eq!(response["output"], json!([item]));
    assert_eq!(
        response["usage"]["output_tokens"],
        whole["usage"]["output_tokens"]
    );
    let ids = |event: &Value| event["item_id"].clone();
    assert!(deltas.iter().all(|delta| ids(delta) == item["id"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn functions_are_called_and_their_outputs_taken() {
    let server = start().await;
    let asked = hello(json!({
        "max_output_tokens": 300, "tools": [weather()], "tool_choice": "required", "parallel_tool_calls": false,
    }));
    let response = server.ok(PATH, asked.clone()).await;
    assert_eq!(response["status"], "completed");
    let call = &response["output"][0];
    assert_eq!(call["type"], "function_call", "{response}");
    assert_eq!(call["name"], "get_weather");
    let arguments: Value = serde_json::from_str(call["arguments"].as_str().unwrap()).unwrap();
    assert!(["Paris", "Rome"].contains(&arguments["city"].as_str().unwrap()));
    let events = named(&server, PATH, asked.clone()).await;
    let pieces = events
        .iter()
        .filter(|(name, _)| name == "response.function_call_arguments.delta");
    let pieces: String = pieces
        .map(|(_, event)| event["delta"].as_str().unwrap())
        .collect();
    assert_eq!(pieces, call["arguments"].as_str().unwrap());
    let done = events
        .iter()
        .find(|(name, _)| name == "response.function_call_arguments.done");
    assert_eq!(done.unwrap().1["arguments"], *pieces);
    // A function by name, and those that are allowed.
    let clock = json!({ "type": "function", "name": "clock", "parameters": { "type": "object", "properties": {}, "additionalProperties": false } });
    let named = json!({ "type": "function", "name": "clock" });
    let allowed = json!({ "type": "allowed_tools", "mode": "required", "tools": [named] });
    for choice in [named, allowed] {
        let mut body = asked.clone();
        body["tools"] = json!([weather(), clock]);
        body["tool_choice"] = choice;
        let response = server.ok(PATH, body).await;
        assert_eq!(response["output"][0]["name"], "clock", "{response}");
    }
    // What goes on from the call, with what is kept and without.
    let output =
        json!({ "type": "function_call_output", "call_id": call["call_id"], "output": "Sunny" });
    let kept = hello(
        json!({ "previous_response_id": response["id"], "input": [output], "tools": [weather()], "tool_choice": "none" }),
    );
    let told = hello(json!({
        "input": [{ "role": "user", "content": "Hello" }, call, output], "tools": [weather()], "tool_choice": "none",
    }));
    let (kept, told) = (server.ok(PATH, kept).await, server.ok(PATH, told).await);
    assert_eq!(text(&kept), text(&told));
    assert_eq!(kept["usage"]["input_tokens"], told["usage"]["input_tokens"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn responses_are_kept_gone_on_from_and_forgotten() {
    let server = start().await;
    let first = server
        .ok(PATH, hello(json!({ "instructions": "Be brief." })))
        .await;
    let id = first["id"].as_str().unwrap();
    let kept = format!("{PATH}/{id}");
    assert_eq!(server.get(&kept).await, (200, first.clone()));
    let next = hello(json!({ "previous_response_id": id, "input": "And?" }));
    let second = server.ok(PATH, next.clone()).await;
    assert_eq!(second["previous_response_id"], id);
    // Instructions are not taken over.
    let chat = json!({ "messages": [
        { "role": "user", "content": "Hello" },
        { "role": "assistant", "content": text(&first) },
        { "role": "user", "content": "And?" },
    ]});
    let count = server.ok("/tokenize", chat).await["count"].clone();
    assert_eq!(second["usage"]["input_tokens"], count);
    // One that is streamed is kept too, one that must not be is not.
    let events = named(&server, PATH, next.clone()).await;
    let streamed = events.last().unwrap().1["response"].clone();
    let id_of = |response: &Value| format!("{PATH}/{}", response["id"].as_str().unwrap());
    assert_eq!(server.get(&id_of(&streamed)).await, (200, streamed));
    let unkept = server.ok(PATH, hello(json!({ "store": false }))).await;
    refusal(&server.get(&id_of(&unkept)).await, 404, Some("response_id"));
    let deleted = server
        .client
        .delete(format!("{}{kept}", server.url))
        .send()
        .await
        .unwrap();
    let deleted = super::harness::json_of(deleted).await;
    assert_eq!(
        deleted,
        (
            200,
            json!({ "id": id, "object": "response", "deleted": true })
        )
    );
    refusal(&server.get(&kept).await, 404, Some("response_id"));
    let found = server.post(PATH, next).await;
    refusal(&found, 400, Some("previous_response_id"));
    assert_eq!(found.1["error"]["code"], "previous_response_not_found");
}

#[tokio::test(flavor = "multi_thread")]
async fn text_has_the_form_that_is_asked_for() {
    let server = Setup::default().context(256).start().await;
    let format = json!({ "type": "json_schema", "name": "it", "strict": true, "schema": { "enum": ["yes", "no"] } });
    let response = server
        .ok(
            PATH,
            hello(json!({ "text": { "format": format, "verbosity": "low" } })),
        )
        .await;
    assert!(["\"yes\"", "\"no\""].contains(&text(&response).trim()));
    let format = json!({ "type": "json_object" });
    let response = server
        .ok(PATH, hello(json!({ "text": { "format": format } })))
        .await;
    assert!(text(&response).trim_start().starts_with('{'));
    // More than the context holds is a bound.
    server
        .ok(PATH, hello(json!({ "max_output_tokens": 100_000 })))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_refused_by_name() {
    let server = start().await;
    let said = |content: Value| json!({ "input": [{ "role": "user", "content": content }] });
    for (more, param) in [
        (
            said(json!([{ "type": "input_image", "image_url": "x" }])),
            "input[0].content[0]",
        ),
        (
            json!({ "input": [{ "type": "item_reference", "id": "x" }] }),
            "input[0].type",
        ),
        (json!({ "input": null }), "input"),
        (json!({ "input": 5 }), "input"),
        (
            json!({ "tools": [{ "type": "web_search" }] }),
            "tools[0].type",
        ),
        (json!({ "tool_choice": "required" }), "tool_choice"),
        (
            json!({ "tool_choice": { "type": "function", "name": "f" } }),
            "tool_choice",
        ),
        (json!({ "background": true }), "background"),
        (json!({ "truncation": "auto" }), "truncation"),
        (json!({ "conversation": "x" }), "conversation"),
        (json!({ "prompt": { "id": "x" } }), "prompt"),
        (
            json!({ "include": ["file_search_call.results"] }),
            "include[0]",
        ),
        (json!({ "top_logprobs": 2 }), "top_logprobs"),
        (json!({ "max_output_tokens": 0 }), "max_output_tokens"),
        (json!({ "temperature": -1 }), "temperature"),
        (json!({ "n": 2 }), "n"),
        (json!({ "no_field": 1 }), "no_field"),
    ] {
        let found = server.post(PATH, hello(more.clone())).await;
        assert_eq!(found.0, 400, "{more}: {}", found.1);
        refusal(&found, 400, Some(param));
    }
    let harmless = json!({
        "reasoning": { "effort": "low", "summary": "auto" }, "include": ["reasoning.encrypted_content"], "store": null,
        "service_tier": "auto", "truncation": "disabled", "background": false, "user": "x", "prompt_cache_key": "y",
        "stream_options": null, "max_tool_calls": 3, "safety_identifier": "z",
    });
    server.ok(PATH, hello(harmless)).await;
    server.assert_empty().await;
}
