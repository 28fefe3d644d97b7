//! What clients see of an answer's tokens: text without control tokens, and the tool calls in it.

use std::sync::Arc;

use crate::engine::FinishReason;
use crate::tokenizer::{Tokenizer, ToolCallEvent, ToolCallParser};

/// One answer's tokens on their way to text.
pub(super) struct Voice {
    tokenizer: Arc<Tokenizer>,
    skip_special: bool,
    parser: Option<ToolCallParser>,
    /// Whether a call has begun.
    pub(super) called: bool,
}

impl Voice {
    /// A voice that has said nothing. With `calls`, tool calls are found in it.
    pub(super) fn new(tokenizer: &Arc<Tokenizer>, skip_special: bool, calls: bool) -> Self {
        Self {
            tokenizer: Arc::clone(tokenizer),
            skip_special,
            parser: calls.then(|| ToolCallParser::new(tokenizer)),
            called: false,
        }
    }

    /// Takes a token, with the text that became certain with it.
    pub(super) fn token(&mut self, id: u32, text: &str) -> Vec<ToolCallEvent> {
        let events = match &mut self.parser {
            Some(parser) if self.skip_special => {
                let shown = without_name(&self.tokenizer, id, text);
                // The parser takes its own markers' names off.
                parser.push(id, shown)
            }
            Some(parser) => parser.push(id, text),
            None if self.skip_special => said(without_name(&self.tokenizer, id, text)),
            None => said(text),
        };
        self.seen(events)
    }

    /// The answer's end, with the text that was held back.
    pub(super) fn finish(&mut self, text: &str) -> Vec<ToolCallEvent> {
        let events = match &mut self.parser {
            Some(parser) => parser.finish(text),
            None => said(text),
        };
        self.seen(events)
    }

    fn seen(&mut self, events: Vec<ToolCallEvent>) -> Vec<ToolCallEvent> {
        let begins = |event: &ToolCallEvent| matches!(event, ToolCallEvent::CallBegin { .. });
        self.called |= events.iter().any(begins);
        events
    }

    /// Why the answer ended, in OpenAI's words.
    pub(super) fn reason(&self, reason: FinishReason) -> &'static str {
        match reason {
            FinishReason::Stop if self.called => "tool_calls",
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Cancelled => "abort",
        }
    }
}

/// A control token's text without its name.
fn without_name<'a>(tokenizer: &Tokenizer, id: u32, text: &'a str) -> &'a str {
    let name = tokenizer.piece(id).and_then(|piece| piece.name);
    name.and_then(|name| text.strip_suffix(name))
        .unwrap_or(text)
}

fn said(text: &str) -> Vec<ToolCallEvent> {
    if text.is_empty() {
        return Vec::new();
    }
    vec![ToolCallEvent::Text(text.to_owned())]
}
