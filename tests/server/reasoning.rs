//! Reasoning that is separated from answers (`--reasoning-parser`), in each protocol.
//!
//! The tests' model does not reason. In copies of it two reserved ids are the markers, and a bias has the model write them.

use serde_json::{Value, json};
use tempfile::TempDir;

use super::events::named;
use super::harness::{Running, Setup, merge, model_dir};

const CHAT: &str = "/v1/chat/completions";

const BEGIN: u32 = 1170;
const END: u32 = 1171;

/// A copy of the tests' model with markers, special or not.
fn model(special: bool) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(model_dir()).unwrap() {
        let file = file.unwrap();
        if file.path().is_file() && file.file_name() != "tokenizer_config.json" {
            std::fs::copy(file.path(), folder.path().join(file.file_name())).unwrap();
        }
    }
    let name = "tokenizer_config.json";
    let text = std::fs::read_to_string(model_dir().join(name)).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    for (id, content) in [(BEGIN, "<think>"), (END, "</think>")] {
        let token = json!({ "content": content, "special": special });
        config["added_tokens_decoder"][id.to_string()] = token;
    }
    std::fs::write(folder.path().join(name), config.to_string()).unwrap();
    folder
}

async fn server(folder: &TempDir, parser: Option<&str>) -> Running {
    let mut setup = Setup {
        model: folder.path().to_owned(),
        ..Setup::default()
    };
    setup.options.reasoning_parser = parser.map(|name| name.parse().unwrap());
    setup.start().await
}

/// A chat whose answer has an end marker somewhere, or nowhere, by the seed.
fn chat(seed: u64) -> Value {
    json!({
        "messages": [{ "role": "user", "content": "Hello" }],
        "max_tokens": 24,
        "temperature": 2,
        "seed": seed,
        "ignore_eos": true,
        // Markers that are special are in the text, and so are the model's other control tokens.
        "skip_special_tokens": false,
        "logit_bias": { END.to_string(): 12 },
    })
}

/// What the parser makes of a text of which it is not said where its reasoning begins.
fn split(text: &str) -> (String, String) {
    let begun = text.trim_start().strip_prefix("<think>").unwrap_or(text);
    let (reasoning, rest) = begun.split_once("</think>").unwrap_or((begun, ""));
    (reasoning.to_owned(), rest.to_owned())
}

fn content(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().unwrap()
}

/// The text of a whole answer with its markers, reasoning and content of the same answer where they are separated.
async fn separated(plain: &Running, parsing: &Running, seed: u64) -> (String, String) {
    let whole = content(&plain.ok(CHAT, chat(seed)).await).to_owned();
    let expected = split(&whole);
    let answer = parsing.ok(CHAT, chat(seed)).await;
    let message = &answer["choices"][0]["message"];
    assert_eq!(message["reasoning"], message["reasoning_content"]);
    let reasoning = message["reasoning"].as_str().unwrap_or_default();
    assert_eq!(
        (reasoning, content(&answer)),
        (&*expected.0, &*expected.1),
        "{whole}"
    );
    let usage = &answer["usage"];
    let tokens = usage["completion_tokens_details"]["reasoning_tokens"]
        .as_u64()
        .unwrap();
    assert!(tokens <= usage["completion_tokens"].as_u64().unwrap());
    assert_eq!(tokens > 0, whole != expected.1, "{usage}");
    // A stream says the same, in pieces, under both names.
    let stream = parsing.stream(CHAT, chat(seed)).await;
    let pieces = |name: &str| -> String {
        let choices = stream.choices(0);
        let pieces = choices.iter().map(|choice| choice["delta"][name].as_str());
        pieces.map(Option::unwrap_or_default).collect()
    };
    assert_eq!((pieces("reasoning"), pieces("content")), expected);
    assert_eq!(pieces("reasoning_content"), expected.0);
    expected
}

#[tokio::test(flavor = "multi_thread")]
async fn chats_have_reasoning_beside_their_content() {
    for special in [false, true] {
        let folder = model(special);
        let (plain, parsing) = (
            server(&folder, None).await,
            server(&folder, Some("kimi_k2")).await,
        );
        let mut both = 0;
        for seed in 0..12 {
            let (reasoning, rest) = separated(&plain, &parsing, seed).await;
            both += usize::from(!reasoning.is_empty() && !rest.is_empty());
        }
        assert!(both > 0, "no answer had both");
        // Without a parser, markers that are text stay in it.
        let answer = plain.ok(CHAT, chat(0)).await;
        assert!(answer["choices"][0]["message"].get("reasoning").is_none());
        let mut marked = chat(0);
        marked["skip_special_tokens"] = json!(true);
        marked["logit_bias"] = json!({ END.to_string(): 100 });
        let answer = plain.ok(CHAT, marked.clone()).await;
        assert_eq!(content(&answer).contains("</think>"), !special);
        // With one, special markers are found though the text leaves them out.
        let answer = parsing.ok(CHAT, marked.clone()).await;
        let usage = &answer["usage"]["completion_tokens_details"];
        assert_eq!(usage["reasoning_tokens"], 1, "{answer}");
        // A second one is text of the content, or a control token that is left out of it.
        let again = if special { "" } else { "</think>" };
        assert_eq!(content(&answer), again.repeat(23), "{answer}");
        let stream = parsing.stream(CHAT, marked.clone()).await;
        assert_eq!(stream.text(0), again.repeat(23));
        // A client may do without it.
        marked["include_reasoning"] = json!(false);
        let answer = parsing.ok(CHAT, marked).await;
        assert!(answer["choices"][0]["message"].get("reasoning").is_none());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn other_protocols_have_it_in_items_and_blocks() {
    let folder = model(false);
    let parsing = server(&folder, Some("qwen3")).await;
    let mut both = 0;
    for seed in 0..8 {
        let answer = parsing.ok(CHAT, chat(seed)).await;
        let reasoning = answer["choices"][0]["message"]["reasoning"].as_str();
        let (reasoning, text) = (reasoning.unwrap_or_default(), content(&answer));
        both += usize::from(!reasoning.is_empty() && !text.is_empty());
        let mut body = chat(seed);
        body.as_object_mut().unwrap().remove("messages");
        body.as_object_mut().unwrap().remove("max_tokens");
        merge(
            &mut body,
            json!({ "input": "Hello", "max_output_tokens": 24 }),
        );
        let response = parsing.ok("/v1/responses", body.clone()).await;
        let items = response["output"].as_array().unwrap();
        let of = |kind: &str| -> String {
            let items = items.iter().filter(|item| item["type"] == kind);
            let text = |item: &Value| item["content"][0]["text"].as_str().unwrap().to_owned();
            items.map(text).collect()
        };
        assert_eq!(
            (&*of("reasoning"), &*of("message")),
            (reasoning, text),
            "{response}"
        );
        let events = named(&parsing, "/v1/responses", body).await;
        let deltas = |name: &str, field: &str| -> String {
            let events = events.iter().filter(|(event, _)| event == name);
            events
                .map(|(_, data)| data[field].as_str().unwrap().to_owned())
                .collect()
        };
        assert_eq!(deltas("response.reasoning_text.delta", "delta"), reasoning);
        assert_eq!(deltas("response.reasoning_text.done", "text"), reasoning);
        assert_eq!(deltas("response.output_text.delta", "delta"), text);

        let message = parsing.ok("/v1/messages", chat(seed)).await;
        let blocks = message["content"].as_array().unwrap();
        let of = |kind: &str| -> String {
            let blocks = blocks.iter().map(|block| block[kind].as_str());
            blocks.map(Option::unwrap_or_default).collect()
        };
        assert_eq!(
            (&*of("thinking"), &*of("text")),
            (reasoning, text),
            "{message}"
        );
        let events = named(&parsing, "/v1/messages", chat(seed)).await;
        let pieces = |field: &str| -> String {
            let pieces = events.iter().map(|(_, data)| data["delta"][field].as_str());
            pieces.map(Option::unwrap_or_default).collect()
        };
        assert_eq!((&*pieces("thinking"), &*pieces("text")), (reasoning, text));
    }
    assert!(both > 0, "no answer had both");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_response_with_reasoning_is_gone_on_from() {
    let folder = model(false);
    let parsing = server(&folder, Some("kimi_k2")).await;
    let mut body = chat(3);
    body.as_object_mut().unwrap().remove("messages");
    body.as_object_mut().unwrap().remove("max_tokens");
    merge(
        &mut body,
        json!({ "input": "Hello", "max_output_tokens": 24 }),
    );
    let first = parsing.ok("/v1/responses", body.clone()).await;
    body["previous_response_id"] = first["id"].clone();
    parsing.ok("/v1/responses", body.clone()).await;
    // The same, with the items in the request.
    body.as_object_mut().unwrap().remove("previous_response_id");
    let mut input = vec![json!({ "role": "user", "content": "Hello" })];
    input.extend(first["output"].as_array().unwrap().iter().cloned());
    input.push(json!({ "role": "user", "content": "Hello" }));
    body["input"] = json!(input);
    parsing.ok("/v1/responses", body).await;
}

/// The prompt's end says where an answer begins, and so does what the client tells the template.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_begins_where_its_prompt_ends() {
    let folder = model(false);
    let (parsing, marked) = (
        server(&folder, Some("kimi_k2")).await,
        server(&folder, Some("deepseek_v3")).await,
    );
    let begun = |text: &str| {
        let mut body = chat(1);
        body["logit_bias"] = json!({ END.to_string(): -100 });
        body["messages"] = json!([
            { "role": "user", "content": "Hello" },
            { "role": "assistant", "content": text },
        ]);
        body["continue_final_message"] = json!(true);
        body["add_generation_prompt"] = json!(false);
        body
    };
    for server in [&parsing, &marked] {
        for (text, reasons) in [("<think>", true), ("<think>x</think>", false), ("x", false)] {
            let answer = server.ok(CHAT, begun(text)).await;
            let reasoning = answer["choices"][0]["message"]["reasoning"].is_string();
            assert_eq!(
                (reasoning, content(&answer).is_empty()),
                (reasons, reasons),
                "{text}"
            );
        }
    }
    for (server, kwargs, reasons) in [
        (&parsing, json!({}), true),
        (&parsing, json!({ "thinking": false }), false),
        (&parsing, json!({ "enable_thinking": false }), false),
        (&marked, json!({}), false),
        (&marked, json!({ "thinking": true }), true),
    ] {
        let mut body = chat(1);
        body["logit_bias"] = json!({ END.to_string(): -100, BEGIN.to_string(): -100 });
        body["chat_template_kwargs"] = kwargs.clone();
        let answer = server.ok(CHAT, body).await;
        let reasoning = answer["choices"][0]["message"]["reasoning"].is_string();
        assert_eq!(reasoning, reasons, "{kwargs}");
    }
}

/// The format of an answer is that of its text; the reasoning before it is free.
#[tokio::test(flavor = "multi_thread")]
async fn a_format_holds_after_the_reasoning() {
    let tool = json!({ "type": "function", "function": { "name": "f", "parameters": {
        "type": "object", "properties": { "x": { "enum": ["a", "b"] } }, "required": ["x"], "additionalProperties": false,
    }}});
    for special in [false, true] {
        let folder = model(special);
        let parsing = server(&folder, Some("kimi_k2")).await;
        let ask = async |more: Value| {
            let mut body = chat(1);
            body.as_object_mut().unwrap().remove("ignore_eos");
            merge(
                &mut body,
                json!({ "max_tokens": 400, "logit_bias": { END.to_string(): 25 } }),
            );
            merge(&mut body, more);
            let answer = parsing.ok(CHAT, body).await;
            answer["choices"][0].clone()
        };
        let choice = ask(json!({ "structured_outputs": { "choice": ["Yes", "No"] } })).await;
        assert_eq!(choice["finish_reason"], "stop", "{choice}");
        let text = choice["message"]["content"].as_str().unwrap();
        assert!(["Yes", "No"].contains(&text), "{choice}");
        let grammar = "start: \"maybe\"";
        let choice = ask(json!({ "structured_outputs": { "grammar": grammar } })).await;
        assert_eq!(choice["message"]["content"], "maybe", "{choice}");
        let choice = ask(json!({ "tools": [tool], "tool_choice": "required" })).await;
        assert_eq!(choice["finish_reason"], "tool_calls", "{choice}");
        let call = &choice["message"]["tool_calls"][0]["function"];
        assert_eq!(call["name"], "f", "{choice}");
    }
}
