//! The client's view of the engine's events: text up to a stop string, and the tool calls in it.
//!
//! An [`OutputProcessor`] stands between the engine, which speaks token ids, and the client of one request. It runs in the
//! engine's thread between two steps, so that nothing of an answer is computed after its stop string.

use std::ops::ControlFlow;
use std::sync::Arc;

use super::event::{Event, FinishReason, Sink, Usage};
use super::stop::StopStrings;
use crate::error::{EngineError, Error, TokenizerError};
use crate::tokenizer::{Marker, StreamDecoder, Tokenizer, ToolCallEvent, ToolCallParser};

/// An event, and the text that it adds to an answer.
#[derive(Clone, Debug)]
pub struct Output {
    /// The event.
    pub event: Event,
    /// The text that is final after this event, as whole characters that cannot be part of a stop string, and tool calls if
    /// these are parsed.
    pub deltas: Vec<ToolCallEvent>,
    /// The stop string that ended the answer, with the event that it is complete.
    pub stop: Option<String>,
    /// Whether the answer ends with this event inside a tool call, in its header or in its arguments.
    pub cut_call: bool,
}

impl Output {
    /// The text of the deltas.
    #[must_use]
    pub fn text(&self) -> String {
        let text = |delta: &ToolCallEvent| match delta {
            ToolCallEvent::Text(text) => Some(text.clone()),
            _ => None,
        };
        self.deltas.iter().filter_map(text).collect()
    }
}

/// Turns the tokens of a request's answers into text.
#[derive(Clone, Debug)]
pub struct OutputProcessor {
    /// The initial state of an answer.
    fresh: AnswerText,
    /// The request's answers.
    answers: Vec<AnswerText>,
    /// Whether an invalid token was generated; the request's failure has been reported then.
    failed: bool,
}

impl OutputProcessor {
    /// A processor that shows every token, control tokens by their names, without stop strings and tool calls.
    #[must_use]
    pub fn new(tokenizer: &Arc<Tokenizer>) -> Self {
        Self {
            fresh: AnswerText {
                decoder: StreamDecoder::new(Arc::clone(tokenizer)),
                stops: StopStrings::default(),
                skip_special: false,
                shown: &[],
                parser: None,
                tokens: 0,
                stopped: false,
            },
            answers: Vec::new(),
            failed: false,
        }
    }

    /// Ends each answer at the first of these strings; its text ends before the string. The name of a control token is not
    /// text: no stop string is found in it or across it.
    ///
    /// # Errors
    /// An empty string.
    pub fn stop_strings(mut self, stops: &[String]) -> Result<Self, EngineError> {
        if stops.iter().any(String::is_empty) {
            return Err(EngineError::EmptyStop);
        }
        self.fresh.stops = StopStrings::new(stops);
        Ok(self)
    }

    /// Whether an answer's text ends after the stop string that came, and not before it. To be called after
    /// [`OutputProcessor::stop_strings`].
    #[must_use]
    pub fn include_stop(mut self, include: bool) -> Self {
        self.fresh.stops = self.fresh.stops.included(include);
        self
    }

    /// Whether control tokens are left out of the text.
    #[must_use]
    pub fn skip_special_tokens(mut self, skip: bool) -> Self {
        self.fresh.skip_special = skip;
        self
    }

    /// Control tokens whose names are in the text even where the others are left out of it, until the last of these names or
    /// a tool call has come.
    #[must_use]
    pub fn show(mut self, names: &'static [&'static str]) -> Self {
        self.fresh.shown = names;
        self
    }

    /// Whether tool calls are parsed; otherwise they stay text.
    #[must_use]
    pub fn tool_calls(mut self, wanted: bool) -> Self {
        self.fresh.parser = wanted.then(ToolCallParser::default);
        self
    }

    /// Passes an event to the client with the text that it adds. Breaks at a token that ends its answer, because a stop
    /// string is complete, or because the token is invalid and the request fails. What the engine computed of an answer after
    /// its stop string is dropped, and not counted.
    pub fn process(&mut self, mut event: Event, client: &mut dyn FnMut(Output)) -> ControlFlow<()> {
        let (mut stopped, mut stop, mut cut_call) = (false, None, false);
        let deltas = match &mut event {
            _ if self.failed => return ControlFlow::Break(()),
            Event::Token { sample, id, .. } => {
                let answer = self.answer(*sample);
                if answer.stopped {
                    return ControlFlow::Break(());
                }
                let deltas = answer.push(*id);
                stopped = answer.stopped;
                deltas
            }
            Event::Finished {
                sample,
                reason,
                usage,
                ..
            } => {
                let answer = self.answer(*sample);
                cut_call = answer
                    .parser
                    .as_ref()
                    .is_some_and(ToolCallParser::is_in_call);
                let deltas = answer.finish(reason, usage);
                let found = answer
                    .stops
                    .found()
                    .filter(|_| *reason == FinishReason::Stop);
                stop = found.map(str::to_owned);
                Ok(deltas)
            }
            _ => Ok(Vec::new()),
        };
        let deltas = deltas.unwrap_or_else(|error| {
            self.failed = true;
            event = Event::Failed(Arc::new(Error::from(error)));
            Vec::new()
        });
        client(Output {
            event,
            deltas,
            stop,
            cut_call,
        });
        if stopped || self.failed {
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    }

    /// A sink for the engine that passes its events to `client` through this processor.
    #[must_use]
    pub fn sink(mut self, mut client: impl FnMut(Output) + Send + 'static) -> Sink {
        Box::new(move |event| self.process(event, &mut client))
    }

    fn answer(&mut self, sample: usize) -> &mut AnswerText {
        if self.answers.len() <= sample {
            self.answers.resize(sample + 1, self.fresh.clone());
        }
        &mut self.answers[sample]
    }
}

/// The text of one answer.
#[derive(Clone, Debug)]
struct AnswerText {
    decoder: StreamDecoder<Arc<Tokenizer>>,
    stops: StopStrings,
    skip_special: bool,
    /// Control tokens that are still shown even so.
    shown: &'static [&'static str],
    parser: Option<ToolCallParser>,
    /// Tokens that were taken.
    tokens: usize,
    /// Whether a stop string is complete.
    stopped: bool,
}

impl AnswerText {
    fn push(&mut self, id: u32) -> Result<Vec<ToolCallEvent>, TokenizerError> {
        let mut token = self.decoder.push(id)?;
        self.tokens += 1;
        // No stop string begins or ends across a control token.
        if token.special.is_some() {
            token.text = self.stops.pass(&token.text);
        } else {
            (token.text, self.stopped) = self.stops.push(&token.text);
        }
        let marks = self.parser.is_some() && Marker::of(&token).is_some();
        let is_shown = |name: &str| self.shown.contains(&name);
        if self.skip_special && !marks && !token.special.as_deref().is_some_and(is_shown) {
            token.special = None;
        }
        let is_last = |name: &str| self.shown.last() == Some(&name);
        if marks || token.special.as_deref().is_some_and(is_last) {
            self.shown = &[];
        }
        Ok(match &mut self.parser {
            Some(parser) => parser.push(&token),
            None => plain(token.to_string()),
        })
    }

    /// Ends the answer: text that was held back becomes final, unless it completes a stop string.
    fn finish(&mut self, reason: &mut FinishReason, usage: &mut Usage) -> Vec<ToolCallEvent> {
        let mut text = String::new();
        if self.stopped {
            // A stop string takes precedence over any other reason to end in the same step, or later.
            *reason = FinishReason::Stop;
            usage.generated_tokens = self.tokens;
        } else {
            // A character whose end never came is no text.
            text = self.stops.finish("");
        }
        match &mut self.parser {
            Some(parser) => parser.finish(&text),
            None => plain(text),
        }
    }
}

fn plain(text: String) -> Vec<ToolCallEvent> {
    if text.is_empty() {
        return Vec::new();
    }
    vec![ToolCallEvent::Text(text)]
}
