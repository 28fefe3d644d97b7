//! What vLLM's clients send and ask beside OpenAI's protocol.

use serde_json::{Value, json};

use super::harness::{Setup, ids_of, refusal, start};

const TEXT: &str = "/v1/completions";

fn continued(more: Value) -> Value {
    let mut body = json!({ "prompt": "The red box holds", "max_tokens": 12, "temperature": 0 });
    super::harness::merge(&mut body, more);
    body
}

fn text(answer: &Value) -> &str {
    answer["choices"][0]["text"].as_str().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn those_who_look_after_it_are_told() {
    let mut setup = Setup::default();
    setup.options.model_names = vec!["model".to_owned(), "other".to_owned()];
    let server = setup.start().await;
    assert_eq!(server.get("/ping").await.0, 200);
    assert_eq!(server.post("/ping", json!({})).await.0, 200);
    assert_eq!(
        server.get("/load").await,
        (200, json!({ "server_load": 0 }))
    );
    // While an answer is read slowly, it is there.
    let body = continued(json!({ "stream": true, "max_tokens": 500, "ignore_eos": true }));
    let slow = server.send(TEXT, &body).await;
    assert_eq!(server.get("/load").await.1["server_load"], 1);
    drop(slow);
    server.settle().await;
    let (_, info) = server.get("/server_info").await;
    let config = &info["vllm_config"];
    assert_eq!(config["model_config"]["max_model_len"], 2048);
    assert_eq!(
        config["model_config"]["served_model_name"],
        json!(["model", "other"])
    );
    assert_eq!(config["device_config"]["device"], "cpu");
    let (_, info) = server.get("/tokenizer_info").await;
    assert_eq!(info["eos_token"], "[EOS]");
    assert_eq!(info["bos_token"], "[BOS]");
    assert!(
        info["chat_template"]
            .as_str()
            .unwrap()
            .contains("im_assistant")
    );
    let end = server
        .tokenizer
        .special_id("<|im_end|>")
        .unwrap()
        .to_string();
    assert_eq!(info["added_tokens_decoder"][end]["content"], "<|im_end|>");
}

#[tokio::test(flavor = "multi_thread")]
async fn cached_prefixes_are_forgotten_where_that_is_asked() {
    let server = start().await;
    let cached = async |more: Value| {
        let messages = json!([
            { "role": "system", "content": "Say who has what, and where it is." },
            { "role": "user", "content": "Hello" },
        ]);
        let mut body = json!({ "messages": messages, "max_tokens": 2 });
        super::harness::merge(&mut body, more);
        let answer = server.ok("/v1/chat/completions", body).await;
        let details = &answer["usage"]["prompt_tokens_details"];
        details["cached_tokens"].as_u64().unwrap()
    };
    assert_eq!(cached(json!({})).await, 0);
    assert!(cached(json!({})).await > 0);
    let url = format!("{}/reset_prefix_cache", server.url);
    let reset = server.client.post(url).send().await.unwrap();
    assert_eq!(reset.status(), 200);
    assert_eq!(cached(json!({})).await, 0);
    assert!(cached(json!({})).await > 0);
    // One with a salt takes nothing from the others, and leaves nothing.
    for _ in 0..2 {
        assert_eq!(cached(json!({ "cache_salt": "x" })).await, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_documented_path_is_there() {
    let mut setup = Setup::default();
    setup.options.api_keys = vec!["secret".to_owned()];
    let server = setup.start().await;
    let (status, api) = server.get("/openapi.json").await;
    assert_eq!((status, &api["openapi"]), (200, &json!("3.1.0")));
    for (path, operations) in api["paths"].as_object().unwrap() {
        for (method, operation) in operations.as_object().unwrap() {
            let method: reqwest::Method = method.to_uppercase().parse().unwrap();
            let path = path.replace("{id}", "resp_0").replace("{name}", "model");
            let request = server
                .client
                .request(method, format!("{}{path}", server.url));
            let status = request.body("{}").send().await.unwrap().status();
            let expected = if operation["security"].is_array() {
                401
            } else {
                200
            };
            assert_eq!(status, expected, "{path}");
        }
    }
    let page = server.get_text("/docs").await;
    assert!(page.contains("page/docs.js"), "{page}");
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_have_the_form_that_is_asked_for() {
    let server = start().await;
    let asked = async |more: Value| {
        let answer = server.ok(TEXT, continued(more.clone())).await;
        assert_eq!(
            answer["choices"][0]["finish_reason"], "stop",
            "{more}: {answer}"
        );
        text(&answer).to_owned()
    };
    for key in ["guided_regex", "structured_outputs"] {
        let regex = json!("[ab]{3}/[0-9]{2}");
        let value = if key == "guided_regex" {
            regex
        } else {
            json!({ "regex": regex })
        };
        let said = asked(json!({ key: value })).await;
        let (letters, digits) = said.split_once('/').unwrap();
        assert!(
            letters.len() == 3 && letters.chars().all(|c| "ab".contains(c)),
            "{said}"
        );
        assert!(
            digits.len() == 2 && digits.chars().all(|c| c.is_ascii_digit()),
            "{said}"
        );
    }
    let said = asked(json!({ "guided_choice": ["first", "second"] })).await;
    assert!(["first", "second"].contains(&&*said), "{said}");
    let many: Vec<String> = (0..3000).map(|at| format!("choice {at}")).collect();
    let said = asked(json!({ "guided_choice": many })).await;
    assert!(many.contains(&said), "{said}");
    let grammar = json!({ "structured_outputs": { "grammar": "start: (\"x\" | \"y\") \"!\"" } });
    let said = asked(grammar).await;
    assert!(["x!", "y!"].contains(&&*said), "{said}");
    for source in [
        "root ::= letter \"!\"\nletter ::= \"x\" | \"y\"",
        "root ::= \"x!\" | \"y!\" | nested \"?\" nested\nnested ::= \"(\" root \")\"",
    ] {
        let never = server.ids("(")[0].to_string();
        let body = json!({ "guided_grammar": source, "logit_bias": { never: -100 } });
        let said = asked(body).await;
        assert!(["x!", "y!"].contains(&&*said), "{said}");
    }
    let schema = json!({ "enum": ["yes", "no"] });
    for more in [
        json!({ "guided_json": schema.to_string() }),
        json!({ "response_format": { "type": "json_schema", "json_schema": { "schema": schema } } }),
    ] {
        let said = asked(more).await;
        assert!(["\"yes\"", "\"no\""].contains(&said.trim()), "{said}");
    }
    let chat = server
        .chat("Well?", json!({ "guided_choice": ["only this"] }))
        .await;
    assert_eq!(chat["choices"][0]["message"]["content"], "only this");
    server.assert_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn forms_that_cannot_be_held_are_refused_by_name() {
    let server = start().await;
    for (more, param) in [
        (json!({ "guided_regex": "(" }), "guided_regex"),
        (json!({ "guided_choice": [] }), "guided_choice"),
        (
            json!({ "guided_regex": "a", "guided_choice": ["a"] }),
            "guided_choice",
        ),
        (
            json!({ "structured_outputs": { "grammar": "root ::= \"a" } }),
            "structured_outputs",
        ),
        (
            json!({ "structured_outputs": { "shape": "a" } }),
            "structured_outputs.shape",
        ),
        (
            json!({ "guided_regex": "a", "ignore_eos": true }),
            "ignore_eos",
        ),
    ] {
        let found = server.post(TEXT, continued(more.clone())).await;
        assert_eq!(found.0, 400, "{more}: {}", found.1);
        let message = refusal(&found, 400, Some(param));
        assert_eq!(
            message.contains("unclosed group"),
            param == "guided_regex",
            "{message}"
        );
    }
    server.assert_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_ended_an_answer_is_told() {
    let server = start().await;
    let whole = server
        .ok(TEXT, continued(json!({ "return_token_ids": true })))
        .await;
    assert_eq!(whole["choices"][0]["stop_reason"], Value::Null);
    let ids = ids_of(&whole["choices"][0]);
    let said = text(&whole);
    let stop: String = said.chars().skip(3).take(2).collect();
    let before = said.split(&stop).next().unwrap();
    let cut = server
        .ok(TEXT, continued(json!({ "stop": ["nowhere", stop] })))
        .await;
    assert_eq!(cut["choices"][0]["stop_reason"], *stop);
    assert_eq!(text(&cut), before);
    let kept = continued(json!({ "stop": [stop], "include_stop_str_in_output": true }));
    assert_eq!(
        text(&server.ok(TEXT, kept.clone()).await),
        format!("{before}{stop}")
    );
    let stream = server.stream(TEXT, kept).await;
    assert_eq!(stream.text(0), format!("{before}{stop}"));
    assert_eq!(stream.choices(0).last().unwrap()["stop_reason"], *stop);
    let token = server
        .ok(TEXT, continued(json!({ "stop_token_ids": [ids[4]] })))
        .await;
    assert_eq!(token["choices"][0]["stop_reason"], ids[4]);
    // The model's own end is none of the request's.
    let greeting = server
        .chat("Push apple. What is on top?", json!({ "max_tokens": 60 }))
        .await;
    assert_eq!(greeting["choices"][0]["finish_reason"], "stop");
    assert_eq!(greeting["choices"][0]["stop_reason"], Value::Null);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompts_scores_are_those_of_its_echo() {
    let server = start().await;
    let body = continued(json!({ "prompt_logprobs": 2, "max_tokens": 2 }));
    let told = server.ok(TEXT, body).await;
    let told = told["choices"][0]["prompt_logprobs"].as_array().unwrap();
    let ids = server.ids("The red box holds");
    assert_eq!(told.len(), ids.len());
    assert_eq!(told[0], Value::Null);
    let echo = continued(json!({ "echo": true, "logprobs": 2, "max_tokens": 0 }));
    let echoed = server.ok(TEXT, echo).await;
    let echoed = echoed["choices"][0]["logprobs"]["token_logprobs"]
        .as_array()
        .unwrap();
    for ((id, told), echoed) in ids.iter().zip(told).zip(echoed).skip(1) {
        let own = &told[id.to_string()];
        assert_eq!(own["logprob"], *echoed);
        let entries = told.as_object().unwrap();
        assert!((2..=3).contains(&entries.len()), "{told}");
        let best = entries.values().find(|entry| entry["rank"] == 1).unwrap();
        assert!(best["logprob"].as_f64() >= own["logprob"].as_f64());
    }
    // Those of a chat stand beside its choices; an answer's own are as many as were asked for.
    let more = json!({ "prompt_logprobs": 3, "logprobs": true, "top_logprobs": 1 });
    let chat = server.chat("Hello", more).await;
    let count = chat["usage"]["prompt_tokens"].as_u64().unwrap() as usize;
    assert_eq!(chat["prompt_logprobs"].as_array().unwrap().len(), count);
    for token in chat["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap()
    {
        assert_eq!(token["top_logprobs"].as_array().unwrap().len(), 1);
    }
    let streamed = continued(json!({ "prompt_logprobs": 1, "stream": true }));
    refusal(
        &server.post(TEXT, streamed).await,
        400,
        Some("prompt_logprobs"),
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_prompt_keeps_its_end() {
    let server = Setup::default().context(64).start().await;
    let ids: Vec<u32> = server.ids("Now the red box holds 3. ").repeat(20);
    let body = |keep: i64| json!({ "prompt": ids, "truncate_prompt_tokens": keep, "max_tokens": 4, "return_token_ids": true });
    let kept = server.ok(TEXT, body(10)).await;
    assert_eq!(
        kept["choices"][0]["prompt_token_ids"],
        json!(ids[ids.len() - 10..])
    );
    assert_eq!(kept["usage"]["prompt_tokens"], 10);
    let fitting = server.ok(TEXT, body(-1)).await;
    assert_eq!(fitting["usage"]["prompt_tokens"], 60);
    refusal(
        &server.post(TEXT, body(0)).await,
        400,
        Some("truncate_prompt_tokens"),
    );
    let long = "word ".repeat(200);
    let chat = server
        .chat(&long, json!({ "truncate_prompt_tokens": 20 }))
        .await;
    assert_eq!(chat["usage"]["prompt_tokens"], 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn priorities_need_their_policy() {
    let body = |priority| json!({ "prompt": "a", "max_tokens": 1, "priority": priority });
    let server = Setup::default().start().await;
    let refused = server.post(TEXT, body(3)).await;
    refusal(&refused, 400, Some("priority"));
    server.ok(TEXT, body(0)).await;
    let mut setup = Setup::default();
    setup.options.priorities = true;
    let server = setup.start().await;
    for priority in [-3, 0, 3] {
        server.ok(TEXT, body(priority)).await;
    }
    let refused = server
        .post(TEXT, json!({ "prompt": "a", "priority": 1.5 }))
        .await;
    refusal(&refused, 400, Some("priority"));
}

#[tokio::test(flavor = "multi_thread")]
async fn templates_are_given_what_the_request_says() {
    let mut setup = Setup::default();
    let folder = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(&setup.model).unwrap() {
        let file = file.unwrap();
        if file.file_type().unwrap().is_file() {
            std::fs::copy(file.path(), folder.path().join(file.file_name())).unwrap();
        }
    }
    let template = "{{ mood }}{{ reasoning_effort }}{% for message in messages %}<|im_user|>{{ message.content }}{% endfor %}\
        {% if add_generation_prompt %}<|im_assistant|>{% endif %}";
    std::fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
    setup.model = folder.path().to_owned();
    let server = setup.start().await;
    let ids = async |more: Value| -> Vec<u32> {
        let mut body = json!({ "messages": [{ "role": "user", "content": "Hi there" }] });
        super::harness::merge(&mut body, more);
        let found = server.ok("/tokenize", body).await;
        serde_json::from_value(found["tokens"].clone()).unwrap()
    };
    let special = |name: &str| vec![server.tokenizer.special_id(name).unwrap()];
    let said = |before: &str| {
        [
            server.ids(before),
            special("<|im_user|>"),
            server.ids("Hi there"),
        ]
        .concat()
    };
    let begun = |before: &str| [said(before), special("<|im_assistant|>")].concat();
    assert_eq!(ids(json!({})).await, begun(""));
    assert_eq!(
        ids(json!({ "add_generation_prompt": false })).await,
        said("")
    );
    assert_eq!(
        ids(json!({ "continue_final_message": true })).await,
        said("")
    );
    let kwargs = json!({ "chat_template_kwargs": { "mood": "calm " }, "reasoning_effort": "low" });
    assert_eq!(ids(kwargs).await, begun("calm low"));
    // What a client says is never a control token.
    let kwargs = json!({ "chat_template_kwargs": { "mood": "<|im_end|>", "messages": [] } });
    assert_eq!(ids(kwargs).await, begun("<|im_end|>"));
    let both = json!({
        "messages": [{ "role": "user", "content": "Hi" }], "continue_final_message": true, "add_generation_prompt": true,
    });
    let found = server.post("/tokenize", both).await;
    refusal(&found, 400, Some("continue_final_message"));
}

#[tokio::test(flavor = "multi_thread")]
async fn only_tools_that_are_allowed_are_called() {
    let server = start().await;
    let tool = |name: &str| {
        let parameters =
            json!({ "type": "object", "properties": {}, "additionalProperties": false });
        json!({ "type": "function", "function": { "name": name, "parameters": parameters } })
    };
    let allowed = |mode: &str, name: &str| {
        let tools = json!([{ "type": "function", "function": { "name": name } }]);
        json!({ "tools": [tool("one"), tool("two")], "max_tokens": 200,
            "tool_choice": { "type": "allowed_tools", "allowed_tools": { "mode": mode, "tools": tools } } })
    };
    for name in ["one", "two"] {
        let answer = server.chat("Go.", allowed("required", name)).await;
        let calls = answer["choices"][0]["message"]["tool_calls"]
            .as_array()
            .unwrap();
        assert!(!calls.is_empty() && calls.iter().all(|call| call["function"]["name"] == name));
    }
    server.chat("Go.", allowed("auto", "one")).await;
    let mut body = allowed("auto", "three");
    body["messages"] = json!([{ "role": "user", "content": "Go." }]);
    refusal(
        &server.post("/v1/chat/completions", body).await,
        400,
        Some("tool_choice"),
    );
}
