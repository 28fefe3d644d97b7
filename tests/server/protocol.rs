//! Paths, statuses, headers, and the forms of answers.

use kimi_linear::server::Origins;
use serde_json::{Value, json};

use super::harness::{Running, Setup, ids_of, refusal, start};

#[tokio::test(flavor = "multi_thread")]
async fn it_says_that_it_is_loading_until_it_is_not() {
    let (server, opener, llm, transfers) = Setup::default().listen().await;
    for (path, expected) in [("/health", 503), ("/v1/models", 503), ("/version", 200)] {
        assert_eq!(server.get(path).await.0, expected, "{path}");
    }
    let body = json!({ "messages": [{ "role": "user", "content": "Hi" }] });
    let response = server.send("/v1/chat/completions", &body).await;
    assert_eq!(response.status(), 503);
    assert!(response.headers().contains_key("retry-after"));
    // There before there is a model.
    assert_eq!(server.metric("vllm:num_requests_running").await, 0.0);
    opener.open(llm.into(), transfers).unwrap();
    assert_eq!(
        server.get("/health").await,
        (200, json!({ "status": "ok" }))
    );
    let (_, models) = server.get("/v1/models").await;
    assert_eq!(models["data"][0]["id"], "model");
    assert_eq!(models["data"][0]["max_model_len"], 2048);
    let (_, model) = server.get("/v1/models/model").await;
    assert_eq!(model, models["data"][0]);
    refusal(&server.get("/v1/models/other").await, 404, Some("model"));
    let (_, version) = server.get("/version").await;
    assert_eq!(version["version"], env!("CARGO_PKG_VERSION"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_said_in_openais_form() {
    let server = start().await;
    let found = server
        .post(
            "/v1/embeddings",
            json!({ "model": "model", "input": "text" }),
        )
        .await;
    assert!(refusal(&found, 400, None).contains("embeddings"));
    let found = server.post("/v1/audio/speech", json!({})).await;
    refusal(&found, 404, None);
    refusal(&server.get("/v1/chat/completions").await, 405, None);
    let body = json!({ "model": "gpt-9", "prompt": "Hi" });
    let found = server.post("/v1/completions", body).await;
    assert!(refusal(&found, 404, Some("model")).contains("gpt-9"));
    assert_eq!(found.1["error"]["code"], "model_not_found");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_says_what_a_whole_answer_says() {
    let server = start().await;
    let body = json!({
        "model": "model",
        "messages": [{ "role": "user", "content": "Hello" }],
        "temperature": 2, "seed": 5, "max_tokens": 20, "ignore_eos": true, "n": 3, "logprobs": true, "top_logprobs": 2,
        "return_token_ids": true,
    });
    let whole = server.ok("/v1/chat/completions", body.clone()).await;
    assert_eq!(whole["object"], "chat.completion");
    assert!(whole["id"].as_str().unwrap().starts_with("chatcmpl-"));
    let mut streamed = body;
    streamed["stream_options"] = json!({ "include_usage": true });
    let stream = server.stream("/v1/chat/completions", streamed).await;
    assert!(stream.done);
    let last = stream.chunks.last().unwrap();
    assert_eq!(last["choices"], json!([]));
    let counted = |usage: &Value| {
        ["prompt_tokens", "completion_tokens", "total_tokens"].map(|name| usage[name].clone())
    };
    assert_eq!(counted(&last["usage"]), counted(&whole["usage"]));
    assert_eq!(whole["usage"]["completion_tokens"], 60);
    let mut contents = Vec::new();
    for index in 0..3 {
        let choice = &whole["choices"][index];
        assert_eq!(choice["index"], index);
        assert_eq!(choice["message"]["content"], stream.text(index));
        assert_eq!(choice["finish_reason"], stream.reason(index));
        let pieces = stream.choices(index);
        assert_eq!(pieces[0]["delta"]["role"], "assistant");
        let entries = |name: &str| -> Vec<Value> {
            let lists = pieces
                .iter()
                .filter_map(|piece| piece["logprobs"][name].as_array());
            lists.flatten().cloned().collect()
        };
        assert_eq!(choice["logprobs"]["content"], json!(entries("content")));
        assert_eq!(choice["logprobs"]["content"].as_array().unwrap().len(), 20);
        for entry in choice["logprobs"]["content"].as_array().unwrap() {
            let top = entry["top_logprobs"].as_array().unwrap();
            assert_eq!(top.len(), 2);
            assert!(top[0]["logprob"].as_f64() >= entry["logprob"].as_f64());
            assert!(entry["logprob"].as_f64().unwrap() <= 0.0);
        }
        let ids = pieces
            .iter()
            .filter_map(|piece| piece["token_ids"].as_array());
        let ids: Vec<Value> = ids.flatten().cloned().collect();
        assert_eq!(choice["token_ids"], json!(ids));
        contents.push(ids_of(choice));
    }
    assert_ne!(contents[0], contents[1], "samples of one seed differ");
}

#[tokio::test(flavor = "multi_thread")]
async fn completions_take_texts_and_ids_and_lists_of_them() {
    let server = start().await;
    let body = |prompt: Value| json!({ "prompt": prompt, "max_tokens": 6, "temperature": 0, "ignore_eos": true, "return_token_ids": true });
    let (one, two) = (server.ids("Hello"), server.ids("Another text"));
    let text = server.ok("/v1/completions", body(json!("Hello"))).await;
    let ids = server.ok("/v1/completions", body(json!(one))).await;
    assert_eq!(text["object"], "text_completion");
    assert_eq!(text["choices"], ids["choices"]);
    assert_eq!(text["choices"][0]["prompt_token_ids"], json!(one));
    assert_eq!(text["choices"][0]["finish_reason"], "length");
    let mut several = body(json!([one, two]));
    several["n"] = json!(2);
    let several = server.ok("/v1/completions", several).await;
    let texts = server
        .ok("/v1/completions", body(json!(["Hello", "Another text"])))
        .await;
    let choices = several["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 4);
    for (index, choice) in choices.iter().enumerate() {
        assert_eq!(choice["index"], index);
        assert_eq!(choice["text"], texts["choices"][index / 2]["text"]);
        assert_eq!(
            choice["prompt_token_ids"],
            json!(if index < 2 { &one } else { &two })
        );
    }
    assert_eq!(several["usage"]["prompt_tokens"], one.len() + two.len());
    assert_eq!(several["usage"]["completion_tokens"], 24);
    let stream = server
        .stream("/v1/completions", body(json!(["Hello", "Another text"])))
        .await;
    for index in 0..2 {
        assert_eq!(texts["choices"][index]["text"], stream.text(index));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_echo_tells_how_likely_the_prompt_was() {
    let server = start().await;
    let prompt = server.ids("The red box holds");
    let body = json!({ "prompt": prompt, "max_tokens": 6, "temperature": 0, "logprobs": 3, "return_token_ids": true });
    let said = server.ok("/v1/completions", body).await;
    let said = &said["choices"][0];
    let all = [prompt.clone(), ids_of(said)].concat();
    let body =
        json!({ "prompt": all, "max_tokens": 0, "temperature": 0, "logprobs": 3, "echo": true });
    let echoed = server.ok("/v1/completions", body.clone()).await;
    let echoed = &echoed["choices"][0];
    let list = |choice: &Value, name: &str| choice["logprobs"][name].as_array().unwrap().clone();
    assert_eq!(list(echoed, "tokens").len(), all.len());
    assert_eq!(list(echoed, "token_logprobs")[0], Value::Null);
    let mut offset = 0;
    for (token, at) in list(echoed, "tokens")
        .iter()
        .zip(list(echoed, "text_offset"))
    {
        assert_eq!(at, offset);
        offset += token.as_str().unwrap().chars().count();
    }
    // What was said of each token as it was generated is said of it as part of a prompt.
    let generated = list(said, "token_logprobs");
    for (generated, echoed) in generated
        .iter()
        .zip(&list(echoed, "token_logprobs")[prompt.len()..])
    {
        let (a, b) = (generated.as_f64().unwrap(), echoed.as_f64().unwrap());
        assert!((a - b).abs() < 1e-3, "{a} against {b}");
    }
    // The three likeliest, and the token itself where it is none of them.
    for (token, top) in list(echoed, "tokens")
        .iter()
        .zip(list(echoed, "top_logprobs"))
        .skip(1)
    {
        let top = top.as_object().unwrap();
        assert!((1..=4).contains(&top.len()), "{top:?}");
        assert!(top.contains_key(token.as_str().unwrap()), "{token} {top:?}");
    }
    let stream = server.stream("/v1/completions", body).await;
    assert_eq!(echoed["text"], stream.text(0));
    // Without log-probabilities the text alone comes back.
    let body = json!({ "prompt": "Hello", "max_tokens": 2, "temperature": 0, "echo": true });
    let echoed = server.ok("/v1/completions", body).await;
    assert!(
        echoed["choices"][0]["text"]
            .as_str()
            .unwrap()
            .starts_with("Hello")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn parameters_do_what_they_say() {
    let server = start().await;
    let sampled = |more: Value| {
        let mut body = json!({ "temperature": 2, "max_tokens": 24, "return_token_ids": true });
        super::harness::merge(&mut body, more);
        body
    };
    let ids = |answer: &Value| ids_of(&answer["choices"][0]);
    let a = ids(&server.chat("Hi", sampled(json!({ "seed": 1 }))).await);
    assert_eq!(
        a,
        ids(&server.chat("Hi", sampled(json!({ "seed": 1 }))).await)
    );
    assert_ne!(
        a,
        ids(&server.chat("Hi", sampled(json!({ "seed": -1 }))).await)
    );
    // One token is all that is left.
    let bias: serde_json::Map<String, Value> = (0..server.tokenizer.vocab_size())
        .map(|id| (id.to_string(), json!(-100)))
        .collect();
    let mut bias = Value::Object(bias);
    bias["65"] = json!(100);
    let forced = server
        .chat(
            "Hi",
            json!({ "logit_bias": bias, "return_token_ids": true }),
        )
        .await;
    assert_eq!(ids(&forced), [65; 8]);
    // Greedy by another name.
    let greedy = ids(&server
        .chat("Hi", json!({ "return_token_ids": true, "max_tokens": 24 }))
        .await);
    for alone in [
        json!({ "top_k": 1 }),
        json!({ "top_p": 1e-6 }),
        json!({ "min_p": 1.0 }),
    ] {
        assert_eq!(ids(&server.chat("Hi", sampled(alone)).await), greedy);
    }
    // The token that came first is a stop now.
    let body = json!({ "stop_token_ids": [greedy[2]], "return_token_ids": true });
    let stopped = server.chat("Hi", body).await;
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    assert!(ids(&stopped).len() <= 2);
    // A penalty on all that came makes another answer of it.
    let penalised = json!({ "frequency_penalty": 2, "presence_penalty": 2, "repetition_penalty": 5, "max_tokens": 24, "return_token_ids": true });
    let penalised = ids(&server.chat("Hi", penalised).await);
    let distinct = |ids: &[u32]| ids.iter().collect::<std::collections::HashSet<_>>().len();
    assert!(distinct(&penalised) >= distinct(&greedy));
    let plain = json!({ "prompt": "abc abc", "temperature": 0, "max_tokens": 60 });
    let whole = server.ok("/v1/completions", plain.clone()).await["choices"][0]["text"]
        .as_str()
        .unwrap()
        .to_owned();
    let stop: String = whole
        .chars()
        .skip(whole.chars().count() / 2)
        .take(1)
        .collect();
    let mut body = plain;
    body["stop"] = json!([stop]);
    let cut = server.ok("/v1/completions", body).await;
    assert_eq!(
        cut["choices"][0]["text"],
        whole.split(&stop).next().unwrap()
    );
    assert_eq!(cut["choices"][0]["finish_reason"], "stop");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_servers_seed_repeats_its_answers() {
    let answers = async || {
        let mut setup = Setup::default();
        setup.options.seed = Some(3);
        let server = setup.start().await;
        let mut answers = Vec::new();
        for _ in 0..3 {
            let answer = server
                .chat(
                    "Hi",
                    json!({ "temperature": 2, "max_tokens": 24, "return_token_ids": true }),
                )
                .await;
            answers.push(ids_of(&answer["choices"][0]));
        }
        answers
    };
    let first = answers().await;
    assert_eq!(first, answers().await);
    assert_ne!(first[0], first[1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn tokenize_and_detokenize_undo_each_other() {
    let server = start().await;
    let text = "Text, <|im_end|> and ünïcode 🙂";
    let found = server
        .ok(
            "/tokenize",
            json!({ "prompt": text, "return_token_strs": true }),
        )
        .await;
    assert_eq!(found["tokens"], json!(server.ids(text)));
    assert_eq!(found["count"], server.ids(text).len());
    assert_eq!(found["max_model_len"], 2048);
    let back = server
        .ok("/detokenize", json!({ "tokens": found["tokens"] }))
        .await;
    assert_eq!(back["prompt"], text);
    let messages = json!([{ "role": "user", "content": "Hi" }]);
    let chat = server
        .ok("/tokenize", json!({ "messages": messages }))
        .await;
    let answer = server
        .ok(
            "/v1/chat/completions",
            json!({ "messages": messages, "max_tokens": 1 }),
        )
        .await;
    assert_eq!(chat["count"], answer["usage"]["prompt_tokens"]);
    refusal(&server.post("/tokenize", json!({})).await, 400, None);
    refusal(
        &server
            .post("/detokenize", json!({ "tokens": [u32::MAX] }))
            .await,
        400,
        Some("tokens"),
    );
}

/// A server with the key `secret`, whose answers pages of https://example.org may read.
async fn guarded() -> Running {
    let mut setup = Setup::default();
    setup.options.api_keys = vec!["secret".to_owned()];
    setup.options.origins = Origins::These(vec!["https://example.org".to_owned()]);
    setup.start().await
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_and_origins() {
    let server = guarded().await;
    let (chat, models) = (
        format!("{}/v1/chat/completions", server.url),
        format!("{}/v1/models", server.url),
    );
    refusal(&server.get("/v1/models").await, 401, None);
    refusal(
        &server.post("/tokenize", json!({ "prompt": "x" })).await,
        401,
        None,
    );
    let wrong = server
        .client
        .get(&models)
        .bearer_auth("Secret")
        .send()
        .await
        .unwrap();
    assert_eq!(wrong.headers()["www-authenticate"], "Bearer");
    refusal(&super::harness::json_of(wrong).await, 401, None);
    let right = server
        .client
        .get(&models)
        .bearer_auth("secret")
        .header("origin", "https://example.org")
        .send()
        .await
        .unwrap();
    assert_eq!(right.status(), 200);
    assert_eq!(
        right.headers()["access-control-allow-origin"],
        "https://example.org"
    );
    // Health and metrics are for those who look after it.
    for path in ["/health", "/version"] {
        assert_eq!(server.get(path).await.0, 200);
    }
    // A browser asks first, without a key.
    let before = server
        .client
        .request(reqwest::Method::OPTIONS, &chat)
        .header("origin", "https://example.org");
    let before = before.header("access-control-request-method", "POST");
    let before = before
        .header(
            "access-control-request-headers",
            "authorization,content-type",
        )
        .send()
        .await
        .unwrap();
    assert_eq!(before.status(), 200);
    assert_eq!(
        before.headers()["access-control-allow-headers"],
        "authorization,content-type"
    );
    let other = server
        .client
        .get(&models)
        .bearer_auth("secret")
        .header("origin", "https://evil.example")
        .send()
        .await
        .unwrap();
    assert!(!other.headers().contains_key("access-control-allow-origin"));
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_of_requests() {
    let server = guarded().await;
    let named = |id: &str| {
        let models = server.client.get(format!("{}/v1/models", server.url));
        models.bearer_auth("secret").header("x-request-id", id)
    };
    let right = named("mine-1").send().await.unwrap();
    assert_eq!(right.headers()["x-request-id"], "mine-1");
    // An id that is none is not repeated.
    let long = named(&"x".repeat(200)).send().await.unwrap();
    assert!(long.headers()["x-request-id"].len() <= 128);
    let body = json!({ "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 1 });
    let answer = server
        .client
        .post(format!("{}/v1/chat/completions", server.url))
        .bearer_auth("secret")
        .header("x-request-id", "mine-2")
        .json(&body);
    let (_, answer) = super::harness::json_of(answer.send().await.unwrap()).await;
    assert_eq!(answer["id"], "chatcmpl-mine-2");
}
