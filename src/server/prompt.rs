//! Converts prompts to ids: messages through the chat template, text through the tokenizer, or ids unchanged.

use schemars::JsonSchema;
use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};
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

/// Fields of a message that change nothing: what clients, their routers and other servers keep with it.
const MESSAGE_BOOKKEEPING: [&str; 28] = [
    "id",
    "type",
    "status",
    "index",
    "model",
    "created",
    "created_at",
    "timestamp",
    "finish_reason",
    "stop_reason",
    "usage",
    "metadata",
    "phase",
    "citations",
    "parsed",
    "padding",
    "cache_control",
    "copilot_cache_control",
    "provider_specific_fields",
    "reasoning_details",
    "reasoning_opaque",
    "reasoning_id",
    "encrypted_content",
    "cot_id",
    "cot_summary",
    "signature",
    "token_ids",
    "images",
];

/// Where clients keep what an answer's reasoning was.
const REASONING: [&str; 5] = [
    "reasoning_content",
    "reasoning",
    "reasoning_text",
    "thinking",
    "thinking_blocks",
];

/// Refuses messages with fields that are let through otherwise.
pub(super) fn check_strict(messages: &[Value]) -> Result<()> {
    for (i, message) in messages.iter().enumerate() {
        for (name, value) in message.as_object().into_iter().flatten() {
            if !value.is_null() && !MESSAGE_FIELDS.iter().any(|(known, _)| known == name) {
                return Err(unknown_field(&format!("messages[{i}]"), name));
            }
        }
    }
    Ok(())
}

fn unknown_field(at: &str, name: &str) -> ApiError {
    let path = format!("{at}.{}", shorten(name));
    let text = format!("`{path}` is not a field of a message");
    ApiError::field(&path, text).code("unknown_parameter")
}

/// The reasoning that a message keeps, taken out of it: `reasoning_content` (vLLM, DeepSeek), `reasoning` (OpenRouter),
/// `thinking_blocks` (litellm), and parts of its content of type `thinking` (Anthropic). Templates know the first.
fn take_reasoning(fields: &mut Map<String, Value>) -> Option<String> {
    let mut found = Vec::new();
    for name in REASONING {
        let value = fields.shift_remove(name);
        let text = match value {
            Some(Value::String(text)) => Some(text),
            Some(Value::Array(blocks)) => Some(blocks.iter().filter_map(thought).collect()),
            _ => None,
        };
        // One of them repeats what another says.
        found.extend(text.filter(|text: &String| !text.is_empty()));
    }
    if let Some(Value::Array(parts)) = fields.get_mut("content") {
        let is_thought = |part: &Value| {
            let kind = part["type"].as_str();
            kind.is_some_and(|kind| ["thinking", "redacted_thinking", "reasoning"].contains(&kind))
        };
        let thoughts: String = parts.iter().filter_map(thought).collect();
        parts.retain(|part| !is_thought(part));
        found.extend(Some(thoughts).filter(|text| !text.is_empty()));
    }
    found.into_iter().next()
}

/// The text of a block of reasoning.
fn thought(block: &Value) -> Option<&str> {
    let text = match block["type"].as_str() {
        Some("thinking") => &block["thinking"],
        Some("reasoning") => &block["text"],
        _ => return None,
    };
    text.as_str()
}

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
    let Value::Object(mut fields) = value else {
        return Err(wrong("", "an object with a `role` and a `content`"));
    };
    let reasoning = take_reasoning(&mut fields);
    let mut message = Map::new();
    for (name, value) in fields {
        let is_kept = !MESSAGE_BOOKKEEPING.contains(&name.as_str());
        if name != "content" && (value.is_null() || !is_kept) {
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
            None => return Err(unknown_field(at, &name)),
        };
    }
    if let Some(reasoning) = reasoning {
        message.insert("reasoning_content".to_owned(), Value::from(reasoning));
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
    encode_chat_at_most(service, chat, usize::MAX)
}

/// The same, of at most `most` tokens.
pub(super) fn encode_chat_at_most(service: &Service, chat: &Chat, most: usize) -> Result<Prompt> {
    let (template, tokenizer) = (service.template()?, service.tokenizer());
    let ids = tokenizer.encode_chat_at_most(template, chat, most)?.ids;
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
#[derive(Clone, Debug, PartialEq, JsonSchema)]
#[schemars(untagged)]
pub(super) enum Prompts {
    Text(String),
    Ids(Vec<u32>),
    Texts(Vec<String>),
    Several(Vec<Vec<u32>>),
}

/// One element of a list of prompts, or of ids.
enum Element {
    Id(u32),
    Text(String),
    Ids(Vec<u32>),
}

/// Reads prompts as they come: an untagged enum would keep the whole list in another form first, at ten times its size.
impl<'de> Deserialize<'de> for Prompts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_any(PromptsVisitor)
    }
}

struct PromptsVisitor;

impl<'de> Visitor<'de> for PromptsVisitor {
    type Value = Prompts;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a string, a list of token ids, or a list of either")
    }

    fn visit_str<E>(self, text: &str) -> std::result::Result<Prompts, E> {
        Ok(Prompts::Text(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<Prompts, A::Error> {
        let mut all = match list.next_element()? {
            None => return Ok(Prompts::Ids(Vec::new())),
            Some(Element::Id(id)) => Prompts::Ids(vec![id]),
            Some(Element::Text(text)) => Prompts::Texts(vec![text]),
            Some(Element::Ids(ids)) => Prompts::Several(vec![ids]),
        };
        while let Some(next) = list.next_element()? {
            match (&mut all, next) {
                (Prompts::Ids(all), Element::Id(id)) => all.push(id),
                (Prompts::Texts(all), Element::Text(text)) => all.push(text),
                (Prompts::Several(all), Element::Ids(ids)) => all.push(ids),
                _ => return Err(A::Error::custom("the elements of the list should be alike")),
            }
        }
        Ok(all)
    }
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_any(ElementVisitor)
    }
}

struct ElementVisitor;

impl<'de> Visitor<'de> for ElementVisitor {
    type Value = Element;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a token id, a string, or a list of token ids")
    }

    fn visit_u64<E: Error>(self, id: u64) -> std::result::Result<Element, E> {
        let id = u32::try_from(id);
        id.map(Element::Id)
            .map_err(|_| E::custom("a token id has at most 32 bits"))
    }

    fn visit_str<E>(self, text: &str) -> std::result::Result<Element, E> {
        Ok(Element::Text(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<Element, A::Error> {
        let mut ids = Vec::new();
        while let Some(id) = list.next_element()? {
            ids.push(id);
        }
        Ok(Element::Ids(ids))
    }
}

/// The ids of a text of at most `most` tokens; where `parse_special` is set, control tokens that it spells are read as such.
pub(super) fn encode_text(
    service: &Service,
    text: &str,
    parse_special: bool,
    most: usize,
) -> Result<Vec<u32>> {
    let tokenizer = service.tokenizer();
    Ok(match parse_special {
        true => tokenizer.encode_with_special(text, most)?,
        false => tokenizer.encode_at_most(text, most)?,
    })
}

impl Prompts {
    /// The ids of each prompt, of at most `most` tokens.
    pub(super) fn encode(
        self,
        service: &Service,
        parse_special: bool,
        most: usize,
    ) -> Result<Vec<Prompt>> {
        let encode = |text: String| encode_text(service, &text, parse_special, most);
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
