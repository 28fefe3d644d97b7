//! Converts a request's items to messages as templates expect them.

use serde_json::{Map, Value, json};

use super::super::error::{ApiError, Result};
use super::super::fields::typed;
use super::super::prompt::content_of;
use super::super::text_or::TextOr;
use super::request::{Item, Part, Role};

/// The messages of an input.
pub(super) fn messages(input: Value) -> Result<Vec<Value>> {
    let items: TextOr<Item> = typed("input", with_types(input))?;
    let items = match items {
        TextOr::Text(text) => return Ok(vec![json!({ "role": "user", "content": text })]),
        TextOr::List(items) => items,
    };
    let mut messages = Messages::default();
    for (i, item) in items.into_iter().enumerate() {
        messages.take(&format!("input[{i}]"), item)?;
    }
    Ok(messages.finish())
}

/// Adds the type of messages to the input, which clients may leave out.
fn with_types(mut input: Value) -> Value {
    for item in input.as_array_mut().into_iter().flatten() {
        if let Value::Object(item) = item
            && item.contains_key("role")
            && !item.contains_key("type")
        {
            item.insert("type".to_owned(), Value::from("message"));
        }
    }
    input
}

/// The messages so far. The model's text, thinking and calls of one answer are several items, but one message.
#[derive(Default)]
struct Messages {
    all: Vec<Value>,
    /// The message of the assistant that further items are added to.
    open: Option<Map<String, Value>>,
}

impl Messages {
    fn close(&mut self) {
        self.all.extend(self.open.take().map(Value::Object));
    }

    fn finish(mut self) -> Vec<Value> {
        self.close();
        self.all
    }

    /// The open message of the assistant; a new one if none is open, or if it has one of these fields already.
    fn assistant(&mut self, but: &[&str]) -> &mut Map<String, Value> {
        let full = |open: &Map<String, Value>| {
            but.iter()
                .any(|name| open.get(*name).is_some_and(|value| *value != ""))
        };
        if self.open.as_ref().is_some_and(full) {
            self.close();
        }
        self.open.get_or_insert_with(|| {
            let fields = [("role", "assistant"), ("content", "")];
            fields
                .map(|(name, value)| (name.to_owned(), Value::from(value)))
                .into_iter()
                .collect()
        })
    }

    fn take(&mut self, at: &str, item: Item) -> Result<()> {
        match item {
            Item::Message { role, content } => {
                let content = texts(&format!("{at}.content"), content)?;
                if role == Role::Assistant {
                    let message = self.assistant(&["content", "tool_calls"]);
                    message.insert("content".to_owned(), content);
                } else {
                    self.close();
                    self.all
                        .push(json!({ "role": role.name(), "content": content }));
                }
            }
            Item::Reasoning { content } => {
                let parts = content.into_iter().flatten().enumerate();
                let texts = parts.map(|(i, part)| text(&format!("{at}.content[{i}]"), part));
                let thought = texts.collect::<Result<String>>()?;
                let message = self.assistant(&["content", "tool_calls", "reasoning_content"]);
                if !thought.is_empty() {
                    message.insert("reasoning_content".to_owned(), Value::from(thought));
                }
            }
            Item::FunctionCall {
                call_id,
                name,
                arguments,
            } => {
                let call = json!({
                    "id": call_id,
                    "type": "function",
                    "function": { "name": name, "arguments": arguments },
                });
                let calls = self
                    .assistant(&[])
                    .entry("tool_calls")
                    .or_insert_with(|| json!([]));
                if let Value::Array(calls) = calls {
                    calls.push(call);
                }
            }
            Item::FunctionCallOutput { call_id, output } => {
                let content = texts(&format!("{at}.output"), output)?;
                self.close();
                self.all
                    .push(json!({ "role": "tool", "tool_call_id": call_id, "content": content }));
            }
        }
        Ok(())
    }
}

fn texts(at: &str, content: TextOr<Part>) -> Result<Value> {
    let parts = match content {
        TextOr::Text(text) => return Ok(Value::from(text)),
        TextOr::List(parts) => parts,
    };
    let each = parts.into_iter().enumerate();
    let texts = each.map(|(i, part)| text(&format!("{at}[{i}]"), part));
    Ok(content_of(texts.collect::<Result<_>>()?))
}

fn text(at: &str, part: Part) -> Result<String> {
    match part {
        Part::InputText { text } | Part::OutputText { text } | Part::ReasoningText { text } => {
            Ok(text)
        }
        Part::Refusal { refusal } => Ok(refusal),
        Part::InputImage => Err(unread(at, "input_image")),
        Part::InputFile => Err(unread(at, "input_file")),
        Part::InputAudio => Err(unread(at, "input_audio")),
    }
}

fn unread(at: &str, kind: &str) -> ApiError {
    let message =
        format!("`{at}`: parts of type `{kind}` are not read here; this model reads text");
    ApiError::field(at, message).code("unsupported_value")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_model_did_in_one_go_is_one_message() {
        let call = |id: &str| json!({ "type": "function_call", "call_id": id, "name": "f", "arguments": "{}" });
        let input = json!([
            { "role": "user", "content": "Hi" },
            { "type": "reasoning", "id": "r", "summary": [], "content": [{ "type": "reasoning_text", "text": "Hm." }] },
            { "type": "message", "role": "assistant", "content": [{ "type": "output_text", "text": "Wait." }] },
            call("a"),
            call("b"),
            { "type": "function_call_output", "call_id": "a", "output": "1" },
            { "type": "function_call_output", "call_id": "b", "output": [{ "type": "input_text", "text": "2" }] },
            { "role": "assistant", "content": "Three." },
            { "role": "assistant", "content": "Four." },
        ]);
        let called = |id: &str| json!({ "id": id, "type": "function", "function": { "name": "f", "arguments": "{}" } });
        let expected = [
            json!({ "role": "user", "content": "Hi" }),
            json!({
                "role": "assistant",
                "content": "Wait.",
                "reasoning_content": "Hm.",
                "tool_calls": [called("a"), called("b")],
            }),
            json!({ "role": "tool", "tool_call_id": "a", "content": "1" }),
            json!({ "role": "tool", "tool_call_id": "b", "content": "2" }),
            json!({ "role": "assistant", "content": "Three." }),
            json!({ "role": "assistant", "content": "Four." }),
        ];
        assert_eq!(messages(input).unwrap(), expected);
    }

    #[test]
    fn what_is_not_read_is_named() {
        let param = |input: Value| {
            let body = messages(input).unwrap_err().body();
            body["error"]["param"].as_str().unwrap().to_owned()
        };
        let image =
            json!([{ "role": "user", "content": [{ "type": "input_image", "image_url": "x" }] }]);
        assert_eq!(param(image), "input[0].content[0]");
        let reference =
            json!([{ "role": "user", "content": "a" }, { "type": "item_reference", "id": "x" }]);
        assert_eq!(param(reference), "input[1].type");
    }
}
