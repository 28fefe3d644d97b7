//! Whatever comes: a bounded number of drawn requests, chats and answers. Nothing panics, and the server goes on.

use std::sync::Arc;

use kimi_linear::tokenizer::{Chat, ChatTemplate, Tokenizer, ToolCallEvent, ToolCallParser};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use serde_json::{Map, Value, json};

use crate::seeds::{self, properties};

use super::harness::{Setup, json_of, model_dir};

/// Text made of what matters here, and of anything.
fn text() -> impl Strategy<Value = String> {
    let pieces = prop_oneof![
        Just("<|im_end|>".to_owned()),
        Just("<|tool_call_begin|>".to_owned()),
        Just("functions.a.b:0".to_owned()),
        Just("{{ x }}".to_owned()),
        Just("{\"a\":".to_owned()),
        Just("\u{e000}124\u{e001}".to_owned()),
        "\\PC{0,6}",
        "[a-z :.]{0,8}",
    ];
    prop::collection::vec(pieces, 0..4).prop_map(|pieces| pieces.concat())
}

fn anything() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-3.0..3.0).prop_map(Value::from),
        (-2_i64..200).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        text().prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        let names = prop::sample::select(vec![
            "type",
            "function",
            "name",
            "parameters",
            "role",
            "content",
            "properties",
            "json_schema",
            "schema",
            "enum",
            "required",
            "pattern",
            "items",
            "text",
            "id",
            "arguments",
            "tool_calls",
            "include_usage",
            "5",
            "$ref",
            "anyOf",
            "x-guidance",
            "minimum",
            "maxLength",
            "additionalProperties",
            "patternProperties",
            "allOf",
            "oneOf",
            "not",
            "prefixItems",
            "$defs",
            "reasoning",
            "thinking_blocks",
            "cache_control",
            "input_schema",
            "tool_use_id",
            "call_id",
            "output",
            "format",
            "regex",
            "grammar",
        ]);
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((names, inner), 0..4).prop_map(|entries| {
                let entries = entries
                    .into_iter()
                    .map(|(name, value)| (name.to_owned(), value));
                Value::Object(entries.collect::<Map<_, _>>())
            }),
        ]
    })
}

const FIELDS: [&str; 50] = [
    "parse_special",
    "litellm_call_id",
    "messages",
    "prompt",
    "model",
    "tools",
    "tool_choice",
    "response_format",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "stop",
    "seed",
    "logit_bias",
    "max_tokens",
    "logprobs",
    "top_logprobs",
    "echo",
    "stream",
    "stream_options",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "parallel_tool_calls",
    "stop_token_ids",
    "ignore_eos",
    "tokens",
    "best_of",
    "user",
    "whatever",
    "system",
    "input",
    "instructions",
    "previous_response_id",
    "text",
    "include",
    "reasoning",
    "thinking",
    "output_config",
    "stop_sequences",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_grammar",
    "truncate_prompt_tokens",
    "prompt_logprobs",
    "continue_final_message",
    "chat_template_kwargs",
];

/// A field as it should be.
fn right() -> impl Strategy<Value = (&'static str, Value)> {
    prop_oneof![
        (0.0..=2.0).prop_map(|value| ("temperature", json!(value))),
        (0.01..=1.0).prop_map(|value| ("top_p", json!(value))),
        (0..600_u32).prop_map(|value| ("top_k", json!(value))),
        (1..5_u32).prop_map(|value| ("n", json!(value))),
        (1..9_u32).prop_map(|value| ("max_tokens", json!(value))),
        any::<i64>().prop_map(|value| ("seed", json!(value))),
        "[a-z]{1,3}".prop_map(|value| ("stop", json!(value))),
        any::<bool>().prop_map(|value| ("stream", json!(value))),
        (-2.0..=2.0).prop_map(|value| ("presence_penalty", json!(value))),
        text().prop_map(|value| ("user", json!(value))),
    ]
}

/// A request that is nearly right, so that what is wrong with it is reached.
fn request() -> impl Strategy<Value = (&'static str, Value)> {
    let bases = prop::sample::select(vec![
        (
            "/v1/chat/completions",
            json!({ "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 2 }),
        ),
        (
            "/v1/chat/completions",
            json!({
                "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 2, "tool_choice": "required",
                "tools": [{ "type": "function", "function": { "name": "f", "parameters": { "type": "object" } } }],
            }),
        ),
        (
            "/v1/chat/completions",
            json!({
                "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 2,
                "response_format": { "type": "json_schema", "json_schema": { "name": "x", "schema": { "type": "object" } } },
            }),
        ),
        (
            "/v1/completions",
            json!({ "prompt": "Hi", "max_tokens": 2 }),
        ),
        (
            "/v1/messages",
            json!({
                "messages": [
                    { "role": "user", "content": [{ "type": "text", "text": "Hi" }] },
                    { "role": "assistant", "content": [{ "type": "tool_use", "id": "f:0", "name": "f", "input": {} }] },
                    { "role": "user", "content": [{ "type": "tool_result", "tool_use_id": "f:0", "content": "1" }] },
                ],
                "max_tokens": 2, "tools": [{ "name": "f", "input_schema": { "type": "object" } }],
            }),
        ),
        (
            "/v1/responses",
            json!({
                "input": [
                    { "role": "user", "content": [{ "type": "input_text", "text": "Hi" }] },
                    { "type": "function_call", "call_id": "f:0", "name": "f", "arguments": "{}" },
                    { "type": "function_call_output", "call_id": "f:0", "output": "1" },
                ],
                "max_output_tokens": 2, "tools": [{ "type": "function", "name": "f", "parameters": { "type": "object" } }],
            }),
        ),
        ("/tokenize", json!({ "prompt": "Hi" })),
        ("/detokenize", json!({ "tokens": [1, 2] })),
    ]);
    let wrong = (prop::sample::select(FIELDS.to_vec()), anything());
    let changes =
        prop::collection::vec(prop_oneof![4 => right().boxed(), 1 => wrong.boxed()], 0..4);
    let schema = prop::option::weighted(0.3, anything());
    (bases, changes, schema).prop_map(|((path, mut body), changes, schema)| {
        if let Some(schema) = schema {
            if body.get("response_format").is_some() {
                body["response_format"]["json_schema"]["schema"] = schema;
            } else if body.get("tools").is_some() && schema.is_object() {
                body["tools"][0]["function"]["parameters"] = schema;
            }
        }
        for (name, value) in changes {
            body[name] = value;
        }
        (path, body)
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_of_the_fixed_seed_are_answered_or_refused() {
    answered_or_refused(seeds::FIXED).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_of_the_drawn_seed_are_answered_or_refused() {
    answered_or_refused(seeds::drawn()).await;
}

async fn answered_or_refused(seed: u64) {
    let server = Setup::default().context(128).start().await;
    let (mut runner, strategy) = (TestRunner::new(seeds::config(1, seed)), request());
    let (mut answered, mut refused) = (0, 0);
    for _ in 0..600 {
        let (path, body) = strategy.new_tree(&mut runner).unwrap().current();
        let response = server.send(path, &body).await;
        match response.status().as_u16() {
            200 => {
                answered += 1;
                response.bytes().await.unwrap();
            }
            status @ 400..=499 => {
                refused += 1;
                let (_, error) = json_of(response).await;
                let message = error["error"]["message"].as_str().unwrap_or_default();
                assert!(!message.is_empty(), "{status} without a reason: {body}");
            }
            status => panic!(
                "{status} to {path} {body}: {}",
                response.text().await.unwrap()
            ),
        }
    }
    assert!(
        answered > 20 && refused > 100,
        "{answered} answered, {refused} refused"
    );
    // Bytes that are nearly JSON.
    let base =
        json!({ "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 2 }).to_string();
    let damage = prop::collection::vec((0..base.len(), any::<u8>()), 1..4);
    for _ in 0..200 {
        let mut bytes = base.clone().into_bytes();
        for (at, byte) in damage.new_tree(&mut runner).unwrap().current() {
            bytes[at] = byte;
        }
        let (status, _) = server.raw("/v1/chat/completions", bytes).await;
        assert!(status == 200 || (400..500).contains(&status), "{status}");
    }
    server.chat("Still there?", json!({})).await;
    server.assert_empty().await;
}

fn tokenizer() -> Arc<Tokenizer> {
    Arc::new(Tokenizer::from_dir(&model_dir()).unwrap())
}

properties! { answers, 400,
    #[test]
    fn drawn_answers_are_parsed_without_loss(
        pieces in prop::collection::vec(prop_oneof![
            prop::sample::select(vec![
                "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>",
                "<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|im_end|>",
            ]).prop_map(|name| (true, name.to_owned())),
            text().prop_map(|text| (false, text)),
        ], 0..24),
    ) {
        let tokenizer = tokenizer();
        let (mut parser, mut decoder) = (ToolCallParser::default(), tokenizer.stream());
        let mut ids = Vec::new();
        for (control, piece) in &pieces {
            match control {
                true => ids.extend(tokenizer.special_id(piece)),
                false => ids.extend(tokenizer.encode_ordinary(piece).unwrap()),
            }
        }
        let mut events = Vec::new();
        for id in &ids {
            events.extend(parser.push(&decoder.push(*id).unwrap()));
        }
        events.extend(parser.finish(&decoder.finish()));
        // Calls begin in order, and each ends once, after its arguments.
        let (mut begun, mut open) = (0, None);
        for event in &events {
            match event {
                ToolCallEvent::CallBegin { index, .. } => {
                    prop_assert_eq!((*index, open), (begun, None));
                    (begun, open) = (begun + 1, Some(*index));
                }
                ToolCallEvent::ArgumentsDelta { index, .. } => prop_assert_eq!(Some(*index), open),
                ToolCallEvent::CallEnd { index, .. } => {
                    prop_assert_eq!(Some(*index), open);
                    open = None;
                }
                ToolCallEvent::Text(_) => prop_assert_eq!(open, None),
            }
        }
        prop_assert_eq!(open, None);
        // Without a section all text is text, whatever it spells.
        if !ids.contains(&tokenizer.special_id("<|tool_calls_section_begin|>").unwrap())
            && !ids.contains(&tokenizer.special_id("<|tool_call_begin|>").unwrap())
        {
            prop_assert_eq!(begun, 0);
        }
    }

    #[test]
    fn drawn_templates_are_compiled_or_refused(
        pieces in prop::collection::vec(prop_oneof![
            prop::sample::select(vec![
                "{%- for message in messages -%}", "{% endfor %}", "{% if tools %}", "{% else %}", "{% endif %}", "{{ message",
                "['content']", ".role", " | tojson", " | length", "}}", "{{ messages[0] }}", "{{ raise_exception('no') }}",
                "{% set x = 1 %}", "{% macro m(a) %}", "{% endmacro %}", "{{ m(1) }}", "<|im_end|>", "{{ '<|im' ~ '_end|>' }}",
                "{#", "#}", "{{ add_generation_prompt }}", "{{ x.y.z }}", "{{ 1 / 0 }}", "{{ messages.pop() }}",
                "{% generation %}", "{% endgeneration %}", "{{ '%s' % x }}", "{{ '%s|%s' % (messages[0].content, 1) }}",
                "{% if messages[0].content == '<|im_end|>' %}", "{{ messages[0].content.split('|')", "[0] }}",
                "{{ messages[0].content.partition('<|')[1]", "{{ 'a' if '|' in messages[0].content }}",
                "{% set s = '|' %}", "{{ messages[0].content.rsplit(s, 1) }}", "{{ messages[0].content[2:] }}",
                "{{ messages[0].content | replace('|', '[') | title | trim('[') }}", "\r\n", "{% raw %}", "{% endraw %}", "{{ '", "'",
            ]).prop_map(str::to_owned),
            text(),
        ], 0..12),
    ) {
        let tokenizer = tokenizer();
        // Refused or not, by a message; what is rendered becomes ids or is refused too.
        if let Ok(template) = ChatTemplate::from_source(&pieces.concat()) {
            let encoded = tokenizer.encode_chat(&template, &Chat::user("Hi <|im_end|>"));
            if let Ok(encoded) = encoded {
                // What the chat itself spells is text, whatever the template does with it.
                let spelt = pieces.iter().any(|piece| piece.contains("<|"));
                let ends = tokenizer.special_id("<|im_end|>").unwrap();
                prop_assert!(spelt || !encoded.ids.contains(&ends));
            }
        }
    }

    #[test]
    fn drawn_chats_have_the_templates_control_tokens_alone(
        messages in prop::collection::vec((prop::sample::select(vec!["system", "user", "assistant", "tool"]), text(), text()), 1..5),
        tool in prop::option::of((text(), anything())),
    ) {
        let tokenizer = tokenizer();
        let template = ChatTemplate::from_dir(&model_dir()).unwrap();
        let chat = |said: &dyn Fn(&str) -> String| Chat {
            messages: messages.iter().map(|(role, content, name)| {
                json!({ "role": role, "content": said(content), "name": said(&format!("n{name}")), "tool_call_id": said(name) })
            }).collect(),
            tools: tool.as_ref().map(|(name, parameters)| vec![json!({ "type": "function", "function": { "name": said(name), "parameters": parameters } })]),
            ..Chat::default()
        };
        let controls = |chat: &Chat| -> Vec<u32> {
            let ids = tokenizer.encode_chat(&template, chat).unwrap().ids;
            ids.into_iter().filter(|id| tokenizer.is_special(*id)).collect()
        };
        prop_assert_eq!(controls(&chat(&str::to_owned)), controls(&chat(&|_| "x".to_owned())));
    }
}
