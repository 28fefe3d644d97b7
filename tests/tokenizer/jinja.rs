//! Templates compared with Jinja2 as transformers sets it up: `jinja/idioms.txt` contains idioms of templates, one after the
//! other.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use kimi_linear::error::TokenizerError;
use kimi_linear::tokenizer::{Chat, ChatTemplate, Tokenizer};
use serde_json::{Value, json};

/// Texts with parts of control tokens, and with substrings that templates look for.
fn chat() -> Value {
    json!({
        "messages": [
            { "role": "system", "content": "Be brief.", "name": "boss" },
            { "role": "user", "content": " </think> a|b [x] " },
            {
                "role": "assistant",
                "content": "<think>\nwhy | not\n</think>\n\nsaid",
                "tool_calls": [{ "id": "functions.f:0", "type": "function", "function": { "name": "f", "arguments": { "z": [1, 2.5, null], "a|": "<|im_end|>" } } }],
            },
            { "role": "tool", "content": "[DONE]", "tool_call_id": "functions.f:0" },
            { "role": "user", "content": [{ "type": "text", "text": "part [1] " }, { "type": "text", "text": "part |2|" }] },
            { "role": "user", "content": "line 1\r\nline \"2\"\n\u{e9}\u{1f642}" },
        ],
        "tools": [
            { "type": "function", "function": { "name": "f", "description": "Does <f> | \u{e9}", "parameters": {
                "type": "object", "properties": { "city": { "type": "string" }, "days": { "type": "integer" } }, "required": ["city"],
            } } },
            { "type": "function", "function": { "name": "a", "parameters": { "type": "object", "properties": {} } } },
        ],
        "add_generation_prompt": true,
    })
}

/// Sorts the keys of objects, as in those of tools.
fn sorted(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().collect();
            entries.sort_by_key(|(key, _)| *key);
            let entries = entries
                .into_iter()
                .map(|(key, value)| (key.clone(), sorted(value)));
            Value::Object(entries.collect())
        }
        Value::Array(list) => list.iter().map(sorted).collect(),
        other => other.clone(),
    }
}

fn jinja2(idioms: &[&str], chat: &Value) -> Vec<Value> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tokenizer/jinja/render.py");
    let mut child = Command::new(crate::python::interpreter())
        .arg(script)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let given = json!({ "idioms": idioms, "chat": chat }).to_string();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(given.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn idioms_render_as_jinja2_renders_them() {
    let text = std::fs::read_to_string(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tokenizer/jinja/idioms.txt"),
    );
    let text = text.unwrap();
    let idioms: Vec<&str> = text
        .split("\n%%\n")
        .map(|idiom| idiom.trim_end_matches('\n'))
        .collect();
    assert!(idioms.len() >= 200, "{}", idioms.len());
    let mut chat = chat();
    chat["tools"] = sorted(&chat["tools"]);
    let expected = jinja2(&idioms, &chat);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/tokenizer");
    let tokenizer = Tokenizer::from_dir(&folder).unwrap();
    let chat: Chat = serde_json::from_value(chat).unwrap();
    let render = |source: &str| -> Result<String, TokenizerError> {
        let template = ChatTemplate::from_source(source)?;
        Ok(tokenizer.encode_chat(&template, &chat)?.rendered)
    };
    let mut wrong = Vec::new();
    for (idiom, expected) in idioms.iter().zip(&expected) {
        let found = render(idiom);
        let same = match (&found, expected["text"].as_str()) {
            (Ok(found), Some(text)) => found == text,
            (Err(_), None) => true,
            _ => false,
        };
        if !same {
            wrong.push(format!("{idiom}\n  expected {expected}\n  found {found:?}"));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} differ:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

/// A template compares the original text, and its output of a chat's text stays text.
#[test]
fn compared_texts_are_nobodys_control_tokens() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/tokenizer");
    let tokenizer = Tokenizer::from_dir(&folder).unwrap();
    let user = "<|im_end|>";
    for (source, rendered) in [
        (
            "{% if messages[0].content == '<|im_end|>' %}same <|im_user|>{{ messages[0].content }}{% endif %}",
            "same <|im_user|><|im_end|>",
        ),
        (
            "{{ '<|im_end|>' in messages[0].content }}<|im_user|>{{ messages[0].content[0:2] ~ 'im_end' ~ messages[0].content[-2:] }}",
            "True<|im_user|><|im_end|>",
        ),
    ] {
        let template = ChatTemplate::from_source(source).unwrap();
        let found = tokenizer.encode_chat(&template, &Chat::user(user)).unwrap();
        assert_eq!(found.rendered, rendered);
        let ids = found.ids.iter().filter(|id| tokenizer.is_special(**id));
        let names: Vec<_> = ids
            .map(|id| tokenizer.piece(*id).unwrap().name.unwrap())
            .collect();
        assert_eq!(names, ["<|im_user|>"], "{source}");
    }
}
