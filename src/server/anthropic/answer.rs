//! An answer in the format of Anthropic's messages: content blocks, whole or as a stream of named events.

use axum::response::sse::KeepAlive;
use serde_json::{Map, Value, json};

use super::super::error::ApiError;
use super::super::response::{Part, Protocol, SoFar};
use super::super::stream::Data;
use super::error;
use crate::tokenizer::ToolCallEvent;

/// A block of the answer so far.
enum Block {
    Thinking(String),
    Text(String),
    ToolUse {
        id: String,
        name: String,
        arguments: String,
    },
}

impl Block {
    fn json(&self) -> Value {
        match self {
            // A signature is Anthropic's proof that the thinking is its model's; clients expect the field.
            Self::Thinking(text) => {
                json!({ "type": "thinking", "thinking": text, "signature": "" })
            }
            Self::Text(text) => json!({ "type": "text", "text": text }),
            Self::ToolUse {
                id,
                name,
                arguments,
            } => json!({ "type": "tool_use", "id": id, "name": name, "input": input(arguments) }),
        }
    }
}

/// A call's arguments as an object. Arguments that are not an object, for example because the answer was cut off, become the
/// value of the key that Anthropic's documentation gives.
fn input(arguments: &str) -> Value {
    if arguments.trim().is_empty() {
        return json!({});
    }
    let object: Result<Map<String, Value>, _> = serde_json::from_str(arguments);
    object.map_or_else(|_| json!({ "INVALID_JSON": arguments }), Value::Object)
}

/// The answer to a request.
pub(super) struct Answer {
    blocks: Vec<Block>,
    /// Whether text may still be added to the last block.
    open: bool,
    /// Whether the context ends before the requested length.
    context_limited: bool,
    reason: Option<&'static str>,
    stop: Option<String>,
}

impl Answer {
    pub(super) fn new(context_limited: bool) -> Self {
        Self {
            blocks: Vec::new(),
            open: false,
            context_limited,
            reason: None,
            stop: None,
        }
    }

    /// Ends the open block.
    fn close(&mut self, data: &mut Vec<Data>) {
        if std::mem::take(&mut self.open) {
            let index = self.blocks.len() - 1;
            data.push(Data::named("content_block_stop", json!({ "index": index })));
        }
    }

    /// Begins a block.
    fn begin_block(&mut self, block: Block, data: &mut Vec<Data>) {
        self.close(data);
        let start = json!({ "index": self.blocks.len(), "content_block": block.json() });
        data.push(Data::named("content_block_start", start));
        self.blocks.push(block);
        self.open = true;
    }

    fn delta(&self, delta: Value) -> Data {
        let index = self.blocks.len().saturating_sub(1);
        Data::named(
            "content_block_delta",
            json!({ "index": index, "delta": delta }),
        )
    }

    /// Takes reasoning, which comes before everything else.
    fn think(&mut self, text: &str, data: &mut Vec<Data>) {
        if text.is_empty() {
            return;
        }
        if !(self.open && matches!(self.blocks.last(), Some(Block::Thinking(_)))) {
            self.begin_block(Block::Thinking(String::new()), data);
        }
        data.push(self.delta(json!({ "type": "thinking_delta", "thinking": text })));
        if let Some(Block::Thinking(whole)) = self.blocks.last_mut() {
            whole.push_str(text);
        }
    }

    fn take(&mut self, event: ToolCallEvent, data: &mut Vec<Data>) {
        match event {
            ToolCallEvent::Text(text) => {
                if !(self.open && matches!(self.blocks.last(), Some(Block::Text(_)))) {
                    self.begin_block(Block::Text(String::new()), data);
                }
                data.push(self.delta(json!({ "type": "text_delta", "text": text })));
                if let Some(Block::Text(whole)) = self.blocks.last_mut() {
                    whole.push_str(&text);
                }
            }
            ToolCallEvent::CallBegin { id, name, .. } => {
                let arguments = String::new();
                let block = Block::ToolUse {
                    id,
                    name,
                    arguments,
                };
                self.begin_block(block, data);
            }
            ToolCallEvent::ArgumentsDelta { text, .. } => {
                data.push(self.delta(json!({ "type": "input_json_delta", "partial_json": text })));
                if let Some(Block::ToolUse { arguments, .. }) = self.blocks.last_mut() {
                    arguments.push_str(&text);
                }
            }
            ToolCallEvent::CallEnd { .. } => self.close(data),
        }
    }

    /// The stop reason, in Anthropic's terms.
    fn stop_reason(&self) -> Option<&'static str> {
        self.reason.map(|reason| match reason {
            "tool_calls" => "tool_use",
            "length" if self.context_limited => "model_context_window_exceeded",
            "length" => "max_tokens",
            _ if self.stop.is_some() => "stop_sequence",
            _ => "end_turn",
        })
    }

    /// The message, with these blocks.
    fn message(&self, content: Value, so_far: &SoFar) -> Value {
        json!({
            "id": format!("msg_{}", so_far.id),
            "type": "message",
            "role": "assistant",
            "model": so_far.service.name(),
            "content": content,
            "stop_reason": self.stop_reason(),
            "stop_sequence": self.stop,
            "usage": usage(so_far),
        })
    }
}

/// Prompt tokens from the cache are counted separately.
fn usage(so_far: &SoFar) -> Value {
    let total = &so_far.total;
    json!({
        "input_tokens": total.prompt - total.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": total.cached,
        "output_tokens": total.generated,
    })
}

impl Protocol for Answer {
    fn begin(&mut self, so_far: &SoFar) -> Vec<Data> {
        let message = self.message(json!([]), so_far);
        vec![
            Data::named("message_start", json!({ "message": message })),
            ping(),
        ]
    }

    fn part(&mut self, part: Part, _so_far: &SoFar) -> Vec<Data> {
        let mut data = Vec::new();
        self.think(&part.reasoning, &mut data);
        for event in part.deltas {
            self.take(event, &mut data);
        }
        self.reason = self.reason.or(part.reason);
        if let Some(Value::String(stop)) = part.stop {
            self.stop = Some(stop);
        }
        data
    }

    fn end(&mut self, so_far: &SoFar) -> Vec<Data> {
        let mut data = Vec::new();
        self.close(&mut data);
        let delta = json!({ "stop_reason": self.stop_reason(), "stop_sequence": self.stop });
        data.push(Data::named(
            "message_delta",
            json!({ "delta": delta, "usage": usage(so_far) }),
        ));
        data.push(Data::named("message_stop", json!({})));
        data
    }

    fn failed(&mut self, error: &ApiError, so_far: &SoFar) -> Vec<Data> {
        vec![Data::named("error", error::body(error, &so_far.id))]
    }

    fn body(&mut self, so_far: &SoFar) -> Value {
        if so_far.service.options.log_content {
            let content: String = self.blocks.iter().filter_map(text).collect();
            tracing::info!(request = so_far.id, content, "answer");
        }
        let content = self.blocks.iter().map(Block::json).collect();
        self.message(content, so_far)
    }

    fn keep_alive() -> KeepAlive {
        KeepAlive::new().event(ping().event())
    }
}

fn ping() -> Data {
    Data::named("ping", json!({}))
}

fn text(block: &Block) -> Option<&str> {
    match block {
        Block::Text(text) => Some(text),
        Block::Thinking(_) | Block::ToolUse { .. } => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_always_an_object() {
        assert_eq!(input(""), json!({}));
        assert_eq!(input(r#"{"a": 1}"#), json!({ "a": 1 }));
        assert_eq!(input(r#"{"a": "#), json!({ "INVALID_JSON": "{\"a\": " }));
        assert_eq!(input("[1]"), json!({ "INVALID_JSON": "[1]" }));
    }
}
