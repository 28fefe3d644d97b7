//! Requests with drawn fields, and bodies with damaged bytes: each is answered, or refused with a sentence.

use std::cell::Cell;

use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::{Value, json};

use super::super::harness::{Running, Setup};
use super::values::{anything, text};
use super::{Kept, served};
use crate::seeds;

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
pub fn request() -> impl Strategy<Value = (&'static str, Value)> {
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

/// The status of the answer to a body. An answer is read to its end, and a refusal has a message.
async fn outcome(server: &Running, path: &str, body: Vec<u8>) -> Result<u16, TestCaseError> {
    let request = server.client.post(format!("{}{path}", server.url));
    let response = request.body(body).send().await.unwrap();
    let status = response.status().as_u16();
    let text = response.text().await.unwrap();
    prop_assert!(
        status == 200 || (400..500).contains(&status),
        "{status}: {text}"
    );
    if status != 200 {
        let error: Value = serde_json::from_str(&text).unwrap_or_default();
        let message = error["error"]["message"].as_str().unwrap_or_default();
        prop_assert!(!message.is_empty(), "{status} without a reason: {text}");
    }
    Ok(status)
}

/// Requests that are nearly right, and with them both outcomes.
fn answered_or_refused(seed: u64) {
    let kept = Kept::here(file!(), seeds::fuzz_cases(500), seed);
    let (answered, refused) = (Cell::new(0), Cell::new(0));
    let cases = kept.cases();
    served(
        Setup::default().context(128),
        kept,
        request(),
        async |server, (path, body)| {
            let status = outcome(server, path, body.to_string().into_bytes()).await?;
            let count = if status == 200 { &answered } else { &refused };
            count.set(count.get() + 1);
            Ok(())
        },
    );
    let (answered, refused) = (answered.get(), refused.get());
    assert!(
        answered > cases / 30 && refused > cases / 6,
        "{answered} answered, {refused} refused"
    );
}

#[test]
fn requests_of_the_fixed_seed_are_answered_or_refused() {
    answered_or_refused(seeds::FIXED);
}

#[test]
fn requests_of_the_drawn_seed_are_answered_or_refused() {
    answered_or_refused(seeds::drawn());
}

/// A change of a body's bytes.
#[derive(Clone, Debug)]
enum Damage {
    Replace(Index, u8),
    Insert(Index, Vec<u8>),
    Remove(Index, usize),
    Repeat(Index, usize),
    Cut(Index),
}

impl Damage {
    fn apply(&self, bytes: &mut Vec<u8>) {
        if bytes.is_empty() {
            return;
        }
        let end = |at: usize, count: usize| (at + count).min(bytes.len());
        match self {
            Self::Replace(at, byte) => {
                let at = at.index(bytes.len());
                bytes[at] = *byte;
            }
            Self::Insert(at, more) => {
                let at = at.index(bytes.len());
                bytes.splice(at..at, more.iter().copied());
            }
            Self::Remove(at, count) => {
                let at = at.index(bytes.len());
                let end = end(at, *count);
                bytes.drain(at..end);
            }
            Self::Repeat(at, count) => {
                let at = at.index(bytes.len());
                let again = bytes[at..end(at, *count)].to_vec();
                bytes.splice(at..at, again);
            }
            Self::Cut(at) => bytes.truncate(at.index(bytes.len())),
        }
    }
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = any::<Index>;
    let pieces = prop_oneof![
        prop::collection::vec(any::<u8>(), 1..4),
        prop::sample::select(vec![
            "\"", "\\", "\\u", "\\ud800", "{", "[", "]", "}", ":", ",", "null", "-", "1e999", "\0",
            "\u{feff}",
        ])
        .prop_map(|text| text.as_bytes().to_vec()),
    ];
    prop_oneof![
        (at(), any::<u8>()).prop_map(|(at, byte)| Damage::Replace(at, byte)),
        (at(), pieces).prop_map(|(at, bytes)| Damage::Insert(at, bytes)),
        (at(), 1..20_usize).prop_map(|(at, count)| Damage::Remove(at, count)),
        (at(), 1..40_usize).prop_map(|(at, count)| Damage::Repeat(at, count)),
        at().prop_map(Damage::Cut),
    ]
}

/// Bytes that are nearly JSON.
fn damaged(seed: u64) {
    let kept = Kept::here(file!(), seeds::fuzz_cases(500), seed);
    let strategy = (request(), prop::collection::vec(damage(), 1..4));
    served(
        Setup::default().context(128),
        kept,
        strategy,
        async |server, ((path, body), damage)| {
            let mut bytes = body.to_string().into_bytes();
            for damage in &damage {
                damage.apply(&mut bytes);
            }
            outcome(server, path, bytes).await.map(|_| ())
        },
    );
}

#[test]
fn damaged_bodies_of_the_fixed_seed_are_answered_or_refused() {
    damaged(seeds::FIXED);
}

#[test]
fn damaged_bodies_of_the_drawn_seed_are_answered_or_refused() {
    damaged(seeds::drawn());
}
