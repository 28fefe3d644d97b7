//! An answer in the format of OpenAI's responses: output items, whole or as a stream of named and numbered events.

use serde_json::{Map, Value, json};

use super::super::error::ApiError;
use super::super::logprobs;
use super::super::response::{Part, Protocol, SoFar};
use super::super::stream::Data;
use super::store::Stored;
use crate::tokenizer::ToolCallEvent;

/// An item of the output so far.
struct Item {
    id: String,
    kind: Kind,
    status: &'static str,
}

enum Kind {
    Reasoning(String),
    Message {
        text: String,
        logprobs: Vec<Value>,
    },
    FunctionCall {
        call_id: String,
        name: String,
        arguments: String,
    },
}

impl Item {
    fn message() -> Self {
        Self {
            id: random_id("msg"),
            kind: Kind::Message {
                text: String::new(),
                logprobs: Vec::new(),
            },
            status: "in_progress",
        }
    }

    fn reasoning() -> Self {
        Self {
            id: random_id("rs"),
            kind: Kind::Reasoning(String::new()),
            status: "in_progress",
        }
    }

    fn call(call_id: String, name: String) -> Self {
        Self {
            id: random_id("fc"),
            kind: Kind::FunctionCall {
                call_id,
                name,
                arguments: String::new(),
            },
            status: "in_progress",
        }
    }

    fn json(&self) -> Value {
        match &self.kind {
            Kind::Reasoning(text) => json!({
                "id": self.id,
                "type": "reasoning",
                "status": self.status,
                "summary": [],
                "content": [reasoning_part(text)],
            }),
            Kind::Message { text, logprobs } => json!({
                "id": self.id,
                "type": "message",
                "status": self.status,
                "role": "assistant",
                "content": [text_part(text, logprobs)],
            }),
            Kind::FunctionCall {
                call_id,
                name,
                arguments,
            } => json!({
                "id": self.id,
                "type": "function_call",
                "status": self.status,
                "call_id": call_id,
                "name": name,
                "arguments": arguments,
            }),
        }
    }
}

fn text_part(text: &str, logprobs: &[Value]) -> Value {
    json!({ "type": "output_text", "text": text, "annotations": [], "logprobs": logprobs })
}

fn reasoning_part(text: &str) -> Value {
    json!({ "type": "reasoning_text", "text": text })
}

/// A random id that cannot be guessed.
pub(super) fn random_id(kind: &str) -> String {
    format!("{kind}_{:032x}", rand::random::<u128>())
}

/// The answer to a request.
pub(super) struct Answer {
    /// The response's id, by which later requests continue it.
    id: String,
    /// Fields of the request that the response repeats.
    echoed: Map<String, Value>,
    /// The messages that are answered, if the response is to be stored.
    store: Option<Vec<Value>>,
    items: Vec<Item>,
    /// Whether text may still be added to the last item.
    open: bool,
    /// Log-probabilities of tokens whose text is not complete yet.
    unsent_logprobs: Vec<Value>,
    reason: Option<&'static str>,
    /// The number of the next event.
    sequence_number: u64,
}

impl Answer {
    pub(super) fn new(echoed: Map<String, Value>, store: Option<Vec<Value>>) -> Self {
        Self {
            id: random_id("resp"),
            echoed,
            store,
            items: Vec::new(),
            open: false,
            unsent_logprobs: Vec::new(),
            reason: None,
            sequence_number: 0,
        }
    }

    fn event(&mut self, name: &'static str, mut fields: Value) -> Data {
        fields["sequence_number"] = Value::from(self.sequence_number);
        self.sequence_number += 1;
        Data::named(name, fields)
    }

    /// An event about the last item.
    fn about_item(&mut self, name: &'static str, more: Value) -> Data {
        let index = self.items.len().saturating_sub(1);
        let mut fields = json!({ "output_index": index });
        if let Some(item) = self.items.last() {
            fields["item_id"] = Value::from(item.id.as_str());
            if !matches!(item.kind, Kind::FunctionCall { .. }) {
                fields["content_index"] = Value::from(0);
            }
        }
        if let (Value::Object(fields), Value::Object(more)) = (&mut fields, more) {
            fields.extend(more);
        }
        self.event(name, fields)
    }

    fn begin_item(&mut self, item: Item, data: &mut Vec<Data>) {
        self.close("completed", data);
        let mut begun = item.json();
        let part = match item.kind {
            Kind::Reasoning(_) => Some(reasoning_part("")),
            Kind::Message { .. } => Some(text_part("", &[])),
            Kind::FunctionCall { .. } => None,
        };
        if part.is_some() {
            begun["content"] = json!([]);
        }
        let index = self.items.len();
        self.items.push(item);
        self.open = true;
        let added = json!({ "output_index": index, "item": begun });
        data.push(self.event("response.output_item.added", added));
        if let Some(part) = part {
            let part = json!({ "part": part });
            data.push(self.about_item("response.content_part.added", part));
        }
    }

    /// Ends the open item.
    fn close(&mut self, status: &'static str, data: &mut Vec<Data>) {
        if !std::mem::take(&mut self.open) {
            return;
        }
        let unsent = std::mem::take(&mut self.unsent_logprobs);
        let index = self.items.len() - 1;
        let item = &mut self.items[index];
        item.status = status;
        let done = match &mut item.kind {
            Kind::Reasoning(text) => vec![
                ("response.reasoning_text.done", json!({ "text": text })),
                (
                    "response.content_part.done",
                    json!({ "part": reasoning_part(text) }),
                ),
            ],
            Kind::Message { text, logprobs } => {
                logprobs.extend(unsent);
                let part = text_part(text, logprobs);
                let text = json!({ "text": text, "logprobs": logprobs });
                vec![
                    ("response.output_text.done", text),
                    ("response.content_part.done", json!({ "part": part })),
                ]
            }
            Kind::FunctionCall {
                name, arguments, ..
            } => {
                let done = json!({ "name": name, "arguments": arguments });
                vec![("response.function_call_arguments.done", done)]
            }
        };
        let whole = json!({ "output_index": index, "item": item.json() });
        for (name, fields) in done {
            data.push(self.about_item(name, fields));
        }
        data.push(self.event("response.output_item.done", whole));
    }

    /// Takes reasoning, which comes before everything else.
    fn think(&mut self, text: &str, data: &mut Vec<Data>) {
        if text.is_empty() {
            return;
        }
        let last = self.items.last().map(|item| &item.kind);
        if !(self.open && matches!(last, Some(Kind::Reasoning(_)))) {
            self.begin_item(Item::reasoning(), data);
        }
        data.push(self.about_item("response.reasoning_text.delta", json!({ "delta": text })));
        if let Some(Item {
            kind: Kind::Reasoning(whole),
            ..
        }) = self.items.last_mut()
        {
            whole.push_str(text);
        }
        // Only messages have log-probabilities.
        self.unsent_logprobs.clear();
    }

    fn take(&mut self, event: ToolCallEvent, data: &mut Vec<Data>) {
        match event {
            ToolCallEvent::Text(text) => {
                let last = self.items.last().map(|item| &item.kind);
                if !(self.open && matches!(last, Some(Kind::Message { .. }))) {
                    self.begin_item(Item::message(), data);
                }
                let unsent = std::mem::take(&mut self.unsent_logprobs);
                let delta = json!({ "delta": text, "logprobs": unsent });
                data.push(self.about_item("response.output_text.delta", delta));
                if let Some(Item {
                    kind:
                        Kind::Message {
                            text: whole,
                            logprobs,
                        },
                    ..
                }) = self.items.last_mut()
                {
                    whole.push_str(&text);
                    logprobs.extend(unsent);
                }
            }
            ToolCallEvent::CallBegin { id, name, .. } => {
                self.begin_item(Item::call(id, name), data);
                // Only messages have log-probabilities.
                self.unsent_logprobs.clear();
            }
            ToolCallEvent::ArgumentsDelta { text, .. } => {
                let delta = json!({ "delta": text });
                data.push(self.about_item("response.function_call_arguments.delta", delta));
                if let Some(Item {
                    kind: Kind::FunctionCall { arguments, .. },
                    ..
                }) = self.items.last_mut()
                {
                    arguments.push_str(&text);
                }
                self.unsent_logprobs.clear();
            }
            ToolCallEvent::CallEnd { complete, .. } => {
                let status = if complete { "completed" } else { "incomplete" };
                self.close(status, data);
            }
        }
    }

    /// The response so far.
    fn response(&self, status: &str, so_far: &SoFar, error: Value) -> Value {
        let cut = status == "incomplete";
        let output: Vec<Value> = self.items.iter().map(Item::json).collect();
        let ended = status != "in_progress";
        let mut response = json!({
            "id": self.id,
            "object": "response",
            "created_at": so_far.created,
            "status": status,
            "error": error,
            "incomplete_details": cut.then(|| json!({ "reason": "max_output_tokens" })),
            "model": so_far.service.name(),
            "output": output,
            "usage": ended.then(|| usage(so_far)),
        });
        if let Value::Object(response) = &mut response {
            response.extend(self.echoed.clone());
        }
        response
    }

    /// Ends the output. Returns the response's status and body, after storing it if requested.
    fn finish(&mut self, so_far: &SoFar, data: &mut Vec<Data>) -> (&'static str, Value) {
        let status = match self.reason {
            Some("length") => "incomplete",
            _ => "completed",
        };
        let is_message = |item: &Item| !matches!(item.kind, Kind::Reasoning(_));
        let silent = !self.items.iter().any(is_message);
        if self.items.is_empty() || (silent && status == "completed") {
            self.begin_item(Item::message(), data);
        }
        self.close(status, data);
        let body = self.response(status, so_far, Value::Null);
        if let Some(mut messages) = self.store.take() {
            messages.push(self.message());
            let stored = Stored {
                body: body.clone(),
                messages,
            };
            so_far.service.responses.insert(self.id.clone(), &stored);
        }
        (status, body)
    }

    /// The answer as a message of a later prompt.
    fn message(&self) -> Value {
        let (mut thought, mut content, mut calls) = (String::new(), String::new(), Vec::new());
        for item in &self.items {
            match &item.kind {
                Kind::Reasoning(text) => thought.push_str(text),
                Kind::Message { text, .. } => content.push_str(text),
                Kind::FunctionCall {
                    call_id,
                    name,
                    arguments,
                } => calls.push(json!({
                    "id": call_id,
                    "type": "function",
                    "function": { "name": name, "arguments": arguments },
                })),
            }
        }
        let mut message = json!({ "role": "assistant", "content": content });
        if !thought.is_empty() {
            message["reasoning_content"] = Value::from(thought);
        }
        if !calls.is_empty() {
            message["tool_calls"] = Value::Array(calls);
        }
        message
    }
}

fn usage(so_far: &SoFar) -> Value {
    let total = &so_far.total;
    json!({
        "input_tokens": total.prompt,
        "input_tokens_details": { "cached_tokens": total.cached },
        "output_tokens": total.generated,
        "output_tokens_details": { "reasoning_tokens": total.reasoning },
        "total_tokens": total.prompt + total.generated,
    })
}

impl Protocol for Answer {
    fn begin(&mut self, so_far: &SoFar) -> Vec<Data> {
        let response = self.response("in_progress", so_far, Value::Null);
        ["response.created", "response.in_progress"]
            .map(|name| self.event(name, json!({ "response": response })))
            .into()
    }

    fn part(&mut self, part: Part, so_far: &SoFar) -> Vec<Data> {
        if let Some((id, Some(found))) = &part.token {
            let tokenizer = so_far.service.tokenizer();
            let scored = logprobs::chat(tokenizer, *id, found, usize::MAX);
            self.unsent_logprobs.push(scored);
        }
        let mut data = Vec::new();
        self.think(&part.reasoning, &mut data);
        for event in part.deltas {
            self.take(event, &mut data);
        }
        self.reason = self.reason.or(part.reason);
        data
    }

    fn end(&mut self, so_far: &SoFar) -> Vec<Data> {
        let mut data = Vec::new();
        let (status, response) = self.finish(so_far, &mut data);
        let name = match status {
            "incomplete" => "response.incomplete",
            _ => "response.completed",
        };
        data.push(self.event(name, json!({ "response": response })));
        data
    }

    fn failed(&mut self, error: &ApiError, so_far: &SoFar) -> Vec<Data> {
        let mut data = Vec::new();
        self.close("incomplete", &mut data);
        let error = json!({ "code": "server_error", "message": error.message() });
        let response = self.response("failed", so_far, error);
        data.push(self.event("response.failed", json!({ "response": response })));
        data
    }

    fn body(&mut self, so_far: &SoFar) -> Value {
        let (_, body) = self.finish(so_far, &mut Vec::new());
        if so_far.service.options.log_content {
            let message = self.message();
            let content = message["content"].as_str().unwrap_or_default();
            tracing::info!(request = so_far.id, content, "answer");
        }
        body
    }
}
