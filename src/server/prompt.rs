//! Converts prompts to ids: messages through the chat template, text through the tokenizer, or ids unchanged.

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::error::{ApiError, Result};
use super::fields::shorten;
use super::service::Service;
use crate::config::kind;
use crate::tokenizer::{Chat, ROLES};

/// A prompt as token ids.
#[derive(Clone, Debug)]
pub(super) struct Prompt {
    pub(super) ids: Vec<u32>,
    /// Positions where turns end.
    pub(super) turn_ends: Vec<usize>,
}

/// Number of turn ends before the last question that are kept, besides the first.
const LAST_TURNS: usize = 3;

/// Fields of a message; `true` for those that must be null.
const MESSAGE_FIELDS: [(&str, bool); 10] = [
    ("role", false),
    ("content", false),
    ("name", false),
    ("tool_calls", false),
    ("tool_call_id", false),
    ("refusal", false),
    ("annotations", false),
    ("reasoning_content", false),
    ("audio", true),
    ("function_call", true),
];

/// Checks messages and converts them to the form that templates expect.
pub(super) fn messages(messages: Vec<Value>) -> Result<Vec<Value>> {
    if messages.is_empty() {
        let message = "`messages` must hold at least one message";
        return Err(ApiError::field("messages", message).code("invalid_value"));
    }
    let each = messages.into_iter().enumerate();
    each.map(|(i, value)| message(&format!("messages[{i}]"), value))
        .collect()
}

fn message(at: &str, value: Value) -> Result<Value> {
    let wrong = |field: &str, expected: &str| {
        let path = format!("{at}{field}");
        ApiError::field(&path, format!("`{path}` must be {expected}")).code("invalid_value")
    };
    let Value::Object(fields) = value else {
        return Err(wrong("", "an object with a `role` and a `content`"));
    };
    let mut message = Map::new();
    for (name, value) in fields {
        if value.is_null() && name != "content" {
            continue;
        }
        match MESSAGE_FIELDS.iter().find(|(known, _)| *known == name) {
            Some((_, false)) => message.insert(name, value),
            Some((known, true)) => {
                return Err(wrong(
                    &format!(".{known}"),
                    "null: it is not understood here",
                ));
            }
            None => {
                let path = format!("{at}.{}", shorten(&name));
                let text = format!("`{path}` is not a field of a message");
                return Err(ApiError::field(&path, text).code("unknown_parameter"));
            }
        };
    }
    let role = message
        .get("role")
        .and_then(Value::as_str)
        .unwrap_or_default();
    if !ROLES.contains(&role) {
        return Err(wrong(
            ".role",
            "`system`, `developer`, `user`, `assistant` or `tool`",
        ));
    }
    let role = if role == "developer" { "system" } else { role }.to_owned();
    if role == "tool" && !message.get("tool_call_id").is_some_and(Value::is_string) {
        return Err(wrong(
            ".tool_call_id",
            "the id of the call that this message answers",
        ));
    }
    let calls = message.get("tool_calls").cloned();
    if role != "assistant" && calls.is_some() {
        return Err(wrong(".tool_calls", "in messages of the assistant alone"));
    }
    let nothing = message.get("content").is_none_or(Value::is_null);
    if nothing && (role != "assistant" || calls.is_none()) {
        return Err(wrong(".content", "a string or a list of text parts"));
    }
    message.insert("role".to_owned(), Value::from(role));
    message.entry("content").or_insert(Value::Null);
    match calls {
        None => {}
        Some(Value::Array(calls)) => {
            for (i, call) in calls.iter().enumerate() {
                check_call(&format!("{at}.tool_calls[{i}]"), call)?;
            }
        }
        Some(_) => return Err(wrong(".tool_calls", "a list")),
    }
    Ok(Value::Object(message))
}

/// A message's content: one text as a string, several as a list of parts.
pub(super) fn content_of(mut texts: Vec<String>) -> Value {
    if texts.len() == 1 {
        return Value::from(texts.remove(0));
    }
    let parts = texts.into_iter();
    parts
        .map(|text| json!({ "type": "text", "text": text }))
        .collect()
}

fn check_call(at: &str, call: &Value) -> Result<()> {
    let function = &call["function"];
    let strings = [
        (".id", &call["id"]),
        (".function.name", &function["name"]),
        (".function.arguments", &function["arguments"]),
    ];
    for (field, value) in strings {
        if !value.is_string() {
            let path = format!("{at}{field}");
            let message = format!("`{path}` must be a string, found {}", kind(value));
            return Err(ApiError::field(&path, message).code("invalid_type"));
        }
    }
    Ok(())
}

/// Renders a chat and encodes it.
pub(super) fn encode_chat(service: &Service, chat: &Chat) -> Result<Prompt> {
    let ids = service
        .tokenizer()
        .encode_chat(service.template()?, chat)?
        .ids;
    let turn_ends = turn_ends(&ids, service.stop_ids());
    Ok(Prompt { ids, turn_ends })
}

/// Positions from which a later prompt may differ: after the first message (many conversations share the system prompt and
/// tools) and after the last few, but not after the very last: the prompt's own end is near.
fn turn_ends(ids: &[u32], stop_ids: &[u32]) -> Vec<usize> {
    let ends = ids
        .iter()
        .enumerate()
        .filter(|(_, id)| stop_ids.contains(id));
    let mut ends: Vec<usize> = ends.map(|(at, _)| at + 1).collect();
    ends.pop();
    let last = ends.len().saturating_sub(LAST_TURNS).max(1).min(ends.len());
    let mut turn_ends = ends.split_off(last);
    if let Some(first) = ends.first() {
        turn_ends.insert(0, *first);
    }
    turn_ends
}

/// Prompts of a plain completion.
#[derive(Clone, Debug, Deserialize, PartialEq, JsonSchema)]
#[serde(
    untagged,
    expecting = "expected a string, a list of token ids, or a list of either"
)]
pub(super) enum Prompts {
    Text(String),
    Ids(Vec<u32>),
    Texts(Vec<String>),
    Several(Vec<Vec<u32>>),
}

impl Prompts {
    /// The ids of each prompt.
    pub(super) fn encode(self, service: &Service) -> Result<Vec<Prompt>> {
        let encode = |text: String| Ok(service.tokenizer().encode_ordinary(&text)?);
        let all: Vec<Vec<u32>> = match self {
            Self::Text(text) => vec![encode(text)?],
            Self::Ids(ids) => vec![ids],
            Self::Texts(texts) => texts.into_iter().map(encode).collect::<Result<_>>()?,
            Self::Several(several) => several,
        };
        let prompt = |ids| Prompt {
            ids,
            turn_ends: Vec::new(),
        };
        Ok(all.into_iter().map(prompt).collect())
    }
}

/// Refuses invalid ids, an empty prompt, or one that fills the context, before the response begins.
pub(super) fn check_ids(service: &Service, ids: &[u32]) -> Result<()> {
    if ids.is_empty() {
        let message = "`prompt` is empty: at least one token is needed";
        return Err(ApiError::field("prompt", message).code("invalid_value"));
    }
    if ids.len() > service.context() {
        return Err(ApiError::context(service.context(), ids.len(), None).param("prompt"));
    }
    match ids.iter().find(|id| **id as usize >= service.vocabulary()) {
        None => Ok(()),
        Some(id) => {
            let last = service.vocabulary() - 1;
            let message = format!("`prompt`: {id} is not a token id; they run from 0 to {last}");
            Err(ApiError::field("prompt", message).code("invalid_value"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_are_the_first_and_the_last_few() {
        let ids = |count: usize| [1, 1, 9].repeat(count);
        assert!(turn_ends(&ids(0), &[9]).is_empty());
        assert!(turn_ends(&ids(1), &[9]).is_empty());
        assert_eq!(turn_ends(&ids(2), &[9]), [3]);
        assert_eq!(turn_ends(&ids(3), &[9]), [3, 6]);
        assert_eq!(turn_ends(&ids(5), &[9]), [3, 6, 9, 12]);
        assert_eq!(turn_ends(&ids(8), &[9]), [3, 15, 18, 21]);
    }
}
