//! What hostile and unlucky clients found, one fault a test.

use std::time::Duration;

use kimi_linear::server::Origins;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::harness::{Running, Setup, json_of, merge, refusal, start};

pub const CHAT: &str = "/v1/chat/completions";
pub const TEXT: &str = "/v1/completions";

pub fn tool(name: &str, parameters: Value) -> Value {
    json!({ "type": "function", "function": { "name": name, "parameters": parameters } })
}

pub fn chat(more: Value) -> Value {
    let mut body = json!({ "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 4, "temperature": 0 });
    merge(&mut body, more);
    body
}

/// A bias under which an answer is these tokens, as far as they are different.
async fn said(server: &Running, more: Value) -> Value {
    let answer = server.ok(CHAT, chat(more)).await;
    answer["choices"][0].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_a_stop_text_cuts_is_no_call_to_run() {
    let server = start().await;
    let parameters = json!({ "type": "object", "properties": { "word": { "enum": ["one two three"] } }, "required": ["word"], "additionalProperties": false });
    let body = json!({ "tools": [tool("speak", parameters)], "tool_choice": "required", "parallel_tool_calls": false, "max_tokens": 400 });
    let whole = said(&server, body.clone()).await;
    assert_eq!(whole["finish_reason"], "tool_calls", "{whole}");
    for stop in ["two", "wor"] {
        let mut cut = body.clone();
        cut["stop"] = json!(stop);
        let cut = said(&server, cut).await;
        assert_eq!(cut["finish_reason"], "stop", "{cut}");
        assert_eq!(cut["message"]["tool_calls"][0]["function"]["name"], "speak");
    }
    // Inside the header, by a stop text and by the number of tokens.
    for more in [json!({ "stop": "pea" }), json!({ "max_tokens": 4 })] {
        let mut cut = body.clone();
        merge(&mut cut, more);
        let cut = said(&server, cut).await;
        assert!(cut["message"].get("tool_calls").is_none(), "{cut}");
        assert_ne!(cut["finish_reason"], "tool_calls", "{cut}");
    }
    server.assert_empty().await;
}

/// The first call is complete, the second is cut in its header: the answer did not end with calls to run.
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_text_in_the_header_of_a_second_call_is_a_stop() {
    let server = start().await;
    let parameters = json!({ "type": "object", "properties": {}, "additionalProperties": false });
    let tools = json!([tool("alpha", parameters.clone()), tool("beta", parameters)]);
    // The section does not end, so that there is always another call.
    let end = server.tokenizer.special_id("<|tool_calls_section_end|>");
    let body = json!({
        "tools": tools, "tool_choice": "required", "stop": "eta", "max_tokens": 300,
        "temperature": 2, "logit_bias": { end.unwrap().to_string(): -100 },
    });
    let mut after_a_call = 0;
    for seed in 0..12 {
        let mut body = body.clone();
        body["seed"] = json!(seed);
        let choice = said(&server, body).await;
        if choice["stop_reason"] != "eta" {
            continue;
        }
        assert_eq!(choice["finish_reason"], "stop", "{choice}");
        let calls = choice["message"]["tool_calls"].as_array();
        after_a_call += usize::from(calls.is_some_and(|calls| !calls.is_empty()));
    }
    assert!(after_a_call > 0, "no second call was cut");
}

/// What a grammar does not hold is checked afterwards: the answer is counted and, unless it is streamed, marked.
#[tokio::test(flavor = "multi_thread")]
async fn strict_fields_are_strict_in_every_protocol() {
    let mut setup = Setup::default();
    setup.options.strict_fields = true;
    let (strict, lenient) = (setup.start().await, start().await);
    let hello = |more: Value| {
        let mut message = json!({ "role": "user", "content": "Hi" });
        merge(&mut message, more);
        json!([message])
    };
    let (responses, messages) = ("/v1/responses", "/v1/messages");
    for (path, body, param) in [
        (
            responses,
            json!({ "input": hello(json!({ "id": "x" })), "max_output_tokens": 2 }),
            "input[0].id",
        ),
        (
            responses,
            json!({ "input": "Hi", "max_output_tokens": 2, "tools": [{ "type": "function", "name": "f", "extra": 1 }] }),
            "tools[0].extra",
        ),
        (
            responses,
            json!({ "input": "Hi", "max_output_tokens": 2, "session_id": "s" }),
            "session_id",
        ),
        (
            messages,
            json!({ "messages": hello(json!({ "id": "x" })), "max_tokens": 2 }),
            "messages[0].id",
        ),
        (
            messages,
            json!({ "messages": [{ "role": "user", "content": [{ "type": "text", "text": "Hi", "cache_control": { "type": "ephemeral" } }] }], "max_tokens": 2 }),
            "messages[0].content[0].cache_control",
        ),
        (
            "/tokenize",
            json!({ "prompt": "Hi", "session_id": "s" }),
            "session_id",
        ),
        (
            "/tokenize",
            json!({ "messages": hello(json!({ "id": "x" })) }),
            "messages[0].id",
        ),
    ] {
        let found = strict.post(path, body.clone()).await;
        assert_eq!(found.0, 400, "{found:?}");
        let message = &found.1["error"]["message"];
        assert!(message.as_str().unwrap().contains(param), "{message}");
        lenient.ok(path, body).await;
    }
    for (path, body) in [
        (
            responses,
            json!({ "input": hello(json!({})), "max_output_tokens": 2 }),
        ),
        (
            messages,
            json!({ "messages": hello(json!({})), "max_tokens": 2 }),
        ),
        ("/tokenize", json!({ "messages": hello(json!({})) })),
    ] {
        strict.ok(path, body).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_taken_whole_or_not_at_all() {
    let mut setup = Setup::default().sequences(1);
    setup.engine.queue = 3;
    let server = setup.start().await;
    let batch = |count: usize| json!({ "prompt": vec!["Hi"; count], "max_tokens": 1 });
    server.ok(TEXT, batch(4)).await;
    // More than there is ever room for: waiting does not help.
    let response = server.send(TEXT, &batch(5)).await;
    assert!(!response.headers().contains_key("retry-after"));
    let message = refusal(&json_of(response).await, 400, Some("prompt"));
    assert!(message.contains("at most 4"), "{message}");
    // More than the queue takes beside a running request: none of it is queued.
    let long = json!({ "prompt": "Once", "max_tokens": 1500, "ignore_eos": true, "stream": true });
    let mut first = server.send(TEXT, &long).await;
    assert!(first.chunk().await.unwrap().is_some());
    let finished = async |reason: &str| {
        let text = server.get_text("/metrics").await;
        let label = format!("finished_reason=\"{reason}\"");
        let line = text
            .lines()
            .find(|line| line.starts_with("vllm:request_success_total") && line.contains(&label));
        line.map_or(0.0, |line| {
            line.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap()
        })
    };
    let before = (finished("error").await, finished("abort").await);
    let found = server.post(TEXT, batch(4)).await;
    refusal(&found, 429, None);
    assert_eq!((finished("error").await, finished("abort").await), before);
    assert_eq!(server.status().await.waiting, 0);
    drop(first);
    server.assert_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_that_cannot_fit_is_told_in_openais_words() {
    let server = Setup::default().context(128).start().await;
    let long = "word ".repeat(1 << 20);
    for (path, body) in [
        (TEXT, json!({ "prompt": long })),
        (
            CHAT,
            chat(json!({ "messages": [{ "role": "user", "content": long }] })),
        ),
        (
            CHAT,
            chat(json!({ "messages": vec![json!({ "role": "user", "content": "Hi" }); 1 << 16] })),
        ),
        (
            "/v1/responses",
            json!({ "input": vec![json!({ "role": "user", "content": "Hi" }); 1 << 16] }),
        ),
        (TEXT, json!({ "prompt": vec![65; 1 << 20] })),
        (TEXT, json!({ "prompt": "word", "max_tokens": 128 })),
    ] {
        let found = server.post(path, body).await;
        let message = refusal(&found, 400, None);
        assert!(
            message.contains("maximum context length is 128 tokens"),
            "{message}"
        );
        assert_eq!(found.1["error"]["code"], "context_length_exceeded");
    }
}

/// Several large bodies are read one after the other, so that a small request finds the others' way free. By no clock: it
/// has to be answered before the last of them.
#[tokio::test(flavor = "multi_thread")]
async fn large_bodies_do_not_hold_small_ones() {
    let server = Setup::default().context(256).start().await;
    // These two encode a text to its end, whatever its length.
    let long = "word ".repeat(800 << 10);
    let message = json!([{ "role": "user", "content": long }]);
    for (path, large) in [
        ("/tokenize", json!({ "prompt": long })),
        ("/v1/messages/count_tokens", json!({ "messages": message })),
    ] {
        let large = large.to_string();
        let sends: Vec<_> = (0..6).map(|_| server.raw(path, large.clone())).collect();
        let all = futures_util::future::join_all(sends);
        let small = async {
            tokio::time::sleep(Duration::from_millis(200)).await;
            server
                .ok(TEXT, json!({ "prompt": "Hi", "max_tokens": 1 }))
                .await
        };
        tokio::select! {
            biased;
            _ = small => {}
            _ = all => panic!("six large bodies were read before a small one"),
        }
        server.settle().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_is_announced_too_large_is_refused_before_it_is_sent() {
    let mut setup = Setup::default();
    setup.options.read_timeout = Duration::from_secs(5);
    let server = setup.start().await;
    for (length, sent) in [(9_000_000_000_usize, 0), (10 << 20, 1000)] {
        let mut stream = TcpStream::connect(server.address()).await.unwrap();
        let head =
            format!("POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(&vec![b' '; sent]).await.unwrap();
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 413");
        // What comes afterwards is read for a time, not for ever.
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).await.unwrap();
    }
    // One that asks whether to send is told so instead, and the connection is closed.
    let mut stream = TcpStream::connect(server.address()).await.unwrap();
    let head = format!(
        "POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000000000\r\nExpect: 100-continue\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 413"));
    server.assert_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_waits_for_no_half_request() {
    let mut server = start().await;
    let mut head = TcpStream::connect(server.address()).await.unwrap();
    head.write_all(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-")
        .await
        .unwrap();
    let mut body = TcpStream::connect(server.address()).await.unwrap();
    let begun = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{\"prompt\": ";
    body.write_all(begun.as_bytes()).await.unwrap();
    // Both have been taken once another request that came later is answered.
    server.get("/health").await;
    server.shut_down();
    let mut answer = String::new();
    body.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    // The client's timeout, at which it used to end, is a minute.
    tokio::time::timeout(Duration::from_secs(40), &mut server.task)
        .await
        .unwrap()
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_may_have_a_time() {
    let mut setup = Setup::default().context(8000);
    setup.options.shutdown_timeout = Some(Duration::from_millis(1));
    let mut server = setup.start().await;
    let endless =
        json!({ "prompt": "Once", "max_tokens": 7000, "ignore_eos": true, "stream": true });
    let mut response = server.send(TEXT, &endless).await;
    assert!(response.chunk().await.unwrap().is_some());
    server.shut_down();
    (&mut server.task).await.unwrap();
    // What was under way is cut.
    let mut rest = String::new();
    while let Ok(Some(chunk)) = response.chunk().await {
        rest.push_str(&String::from_utf8_lossy(&chunk));
    }
    assert!(!rest.contains("[DONE]"), "it came to its end");
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_may_spell_control_tokens_where_that_is_asked_for() {
    let server = start().await;
    let end = server.tokenizer.special_id("<|im_end|>").unwrap();
    let text = "a<|im_end|>b";
    let ids = async |server: &Running, more: Value| {
        let mut body = json!({ "prompt": text });
        merge(&mut body, more);
        let found = server.ok("/tokenize", body).await;
        serde_json::from_value::<Vec<u32>>(found["tokens"].clone()).unwrap()
    };
    assert!(!ids(&server, json!({})).await.contains(&end));
    let read = ids(&server, json!({ "parse_special": true })).await;
    assert_eq!(read, [server.ids("a"), vec![end], server.ids("b")].concat());
    let body =
        json!({ "prompt": text, "parse_special": true, "max_tokens": 1, "return_token_ids": true });
    let answer = server.ok(TEXT, body).await;
    assert_eq!(answer["choices"][0]["prompt_token_ids"], json!(read));
    let mut setup = Setup::default();
    setup.options.parse_special = true;
    let other = setup.start().await;
    assert_eq!(ids(&other, json!({})).await, read);
    assert!(
        !ids(&other, json!({ "parse_special": false }))
            .await
            .contains(&end)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn logprobs_tell_the_chosen_token_and_where_it_is() {
    let server = start().await;
    // Each byte of a character that the demo's vocabulary does not have whole is a token.
    let prompt = server.ids("a\u{1f642}b\u{1f643}c");
    assert!(prompt.len() > 5);
    let body = json!({ "prompt": prompt, "echo": true, "logprobs": 1, "max_tokens": 0 });
    let choice = server.ok(TEXT, body).await["choices"][0].clone();
    let lists = &choice["logprobs"];
    let text: Vec<char> = choice["text"].as_str().unwrap().chars().collect();
    let (tokens, offsets) = (
        lists["tokens"].as_array().unwrap(),
        lists["text_offset"].as_array().unwrap(),
    );
    for (token, offset) in tokens.iter().zip(offsets) {
        let (token, offset) = (token.as_str().unwrap(), offset.as_u64().unwrap() as usize);
        if !token.contains('\u{fffd}') {
            let there: String = text[offset..].iter().take(token.chars().count()).collect();
            assert_eq!(there, token);
        }
    }
    // With a temperature that draws any token, the chosen one is seldom the likeliest.
    let body = json!({ "prompt": "Hi", "temperature": 2, "seed": 4, "max_tokens": 20, "logprobs": 1, "ignore_eos": true });
    let choice = server.ok(TEXT, body).await["choices"][0].clone();
    let lists = &choice["logprobs"];
    let mut more = 0;
    for ((token, logprob), top) in lists["tokens"]
        .as_array()
        .unwrap()
        .iter()
        .zip(lists["token_logprobs"].as_array().unwrap())
        .zip(lists["top_logprobs"].as_array().unwrap())
    {
        let top = top.as_object().unwrap();
        more += usize::from(top.len() == 2);
        assert!(
            top.contains_key(token.as_str().unwrap()),
            "{token} {logprob} {top:?}"
        );
    }
    assert!(more > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_cut_inside_a_character_ends_before_it() {
    let server = start().await;
    let bytes = server.ids("\u{1f642}");
    assert!(bytes.len() > 1);
    // A bias draws the character's first token, whatever the model thinks.
    let first = json!({ bytes[0].to_string(): 100 });
    let body = json!({ "prompt": "Hi", "max_tokens": 1, "logit_bias": first, "temperature": 0 });
    for stream in [false, true] {
        let text = match stream {
            true => server.stream(TEXT, body.clone()).await.text(0),
            false => server.ok(TEXT, body.clone()).await["choices"][0]["text"]
                .as_str()
                .unwrap()
                .to_owned(),
        };
        assert_eq!(text, "");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn other_hosts_and_pages_may_not_ask() {
    let server = start().await;
    let ask = async |server: &Running, headers: &[(&str, &str)]| {
        let mut request = server.client.post(format!("{}{TEXT}", server.url));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let body = json!({ "prompt": "Hi", "max_tokens": 1 }).to_string();
        json_of(request.body(body).send().await.unwrap()).await
    };
    let json = ("content-type", "application/json; charset=utf-8");
    for good in [
        vec![],
        vec![json],
        vec![("host", "localhost:1"), json],
        vec![("origin", "http://localhost:3000"), json],
        vec![("origin", server.url.as_str()), json],
    ] {
        assert_eq!(ask(&server, &good).await.0, 200, "{good:?}");
    }
    for (bad, status) in [
        (vec![("host", "rebound.example:8000"), json], 403),
        (
            vec![
                ("host", "rebound.example"),
                ("origin", "http://rebound.example"),
                json,
            ],
            403,
        ),
        (vec![("origin", "https://evil.example"), json], 403),
        (
            vec![("origin", "null"), ("content-type", "text/plain")],
            403,
        ),
        (vec![("content-type", "text/plain;charset=UTF-8")], 415),
        (
            vec![("content-type", "application/x-www-form-urlencoded")],
            415,
        ),
    ] {
        refusal(&ask(&server, &bad).await, status, None);
    }
    let mut setup = Setup::default();
    setup.options.origins = Origins::These(vec!["https://evil.example".to_owned()]);
    setup.options.hosts = vec!["rebound.example".to_owned()];
    let other = setup.start().await;
    let headers = [
        ("origin", "https://evil.example"),
        ("host", "rebound.example:1"),
        json,
    ];
    assert_eq!(ask(&other, &headers).await.0, 200);
    // Whoever has a key may ask from anywhere.
    let mut setup = Setup::default();
    setup.options.api_keys = vec!["k".to_owned()];
    let keyed = setup.start().await;
    let headers = [
        ("origin", "https://evil.example"),
        ("host", "any.example"),
        ("authorization", "Bearer k"),
    ];
    assert_eq!(ask(&keyed, &headers).await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn bookkeeping_is_let_through_and_what_means_something_is_not() {
    let server = start().await;
    // Histories as vLLM, OpenRouter, litellm, Copilot and Anthropic keep them.
    let histories = [
        json!({ "role": "assistant", "content": "Yes.", "reasoning_content": "why", "tool_calls": null, "function_call": null, "audio": null, "refusal": null, "annotations": [] }),
        json!({ "role": "assistant", "content": "Yes.", "reasoning": "why", "reasoning_details": [{ "type": "reasoning.text", "text": "why" }] }),
        json!({ "role": "assistant", "content": "Yes.", "thinking_blocks": [{ "type": "thinking", "thinking": "why", "signature": "x" }], "provider_specific_fields": { "a": 1 } }),
        json!({ "role": "assistant", "content": [{ "type": "thinking", "thinking": "why", "signature": "x" }, { "type": "text", "text": "Yes." }] }),
        json!({ "role": "assistant", "content": "Yes.", "copilot_cache_control": { "type": "ephemeral" }, "reasoning_opaque": "x", "unknown": null }),
        json!({ "role": "assistant", "content": null, "tool_calls": [{ "id": "a", "index": 0, "type": "function", "cache_control": null, "function": { "name": "f", "arguments": "{}" } }] }),
    ];
    for history in histories {
        let messages = json!([
            { "role": "user", "content": "Hi", "cache_control": { "type": "ephemeral" }, "id": "msg_1" },
            history,
            { "role": "user", "content": [{ "type": "text", "text": "So", "cache_control": { "type": "ephemeral" } }] },
        ]);
        server.ok(CHAT, chat(json!({ "messages": messages }))).await;
    }
    let body = chat(json!({
        "max_tokens": 2.0, "n": 1.0, "litellm_call_id": "x", "session_id": "s", "unknown": null,
        "tools": [{ "type": "function", "cache_control": { "type": "ephemeral" }, "function": { "name": "f", "description": null, "strict": null, "unknown": null, "parameters": {} } }],
    }));
    server.ok(CHAT, body.clone()).await;
    for (more, param) in [
        (json!({ "unheard_of": 1 }), "unheard_of"),
        (
            json!({ "messages": [{ "role": "user", "content": "Hi", "prefix": true }] }),
            "messages[0].prefix",
        ),
        (json!({ "n": 1.5 }), "n"),
    ] {
        refusal(&server.post(CHAT, chat(more)).await, 400, Some(param));
    }
    let mut setup = Setup::default();
    setup.options.strict_fields = true;
    let strict = setup.start().await;
    refusal(
        &strict.post(CHAT, chat(json!({ "session_id": "s" }))).await,
        400,
        Some("session_id"),
    );
    let messages = json!([{ "role": "user", "content": "Hi", "id": "x" }]);
    refusal(
        &strict
            .post(CHAT, chat(json!({ "messages": messages })))
            .await,
        400,
        Some("messages[0].id"),
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn half_a_surrogate_pair_is_called_that() {
    let server = start().await;
    let found = server.raw(TEXT, r#"{"prompt": "\ud83d"}"#).await;
    assert!(refusal(&found, 400, None).contains("half of a surrogate pair"));
}
