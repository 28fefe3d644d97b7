//! What clients see of the engine's events: text, without what a stop string hides, and the tool calls in it.
//!
//! An [`OutputProcessor`] stands between the engine, which speaks token ids, and the client of one request. It runs in the
//! engine's thread between two steps, so that nothing of an answer is computed after its stop string.

use std::ops::ControlFlow;
use std::sync::Arc;

use super::event::{Event, FinishReason, Sink, Usage};
use super::stop::StopStrings;
use crate::error::{EngineError, Error, TokenizerError};
use crate::tokenizer::{Marker, StreamDecoder, Tokenizer, ToolCallEvent, ToolCallParser};

/// An event, and what it adds to an answer's text.
#[derive(Clone, Debug)]
pub struct Output {
    /// The event.
    pub event: Event,
    /// What became certain with a token or an answer's end: whole characters that are no part of a stop string, and tool
    /// calls, where they are looked for.
    pub deltas: Vec<ToolCallEvent>,
    /// The stop string that ended the answer, with the event that it is complete.
    pub stop: Option<String>,
}

impl Output {
    /// The text among the deltas.
    #[must_use]
    pub fn text(&self) -> String {
        let text = |delta: &ToolCallEvent| match delta {
            ToolCallEvent::Text(text) => Some(text.clone()),
            _ => None,
        };
        self.deltas.iter().filter_map(text).collect()
    }
}

/// Makes text of the answers to one request.
#[derive(Clone, Debug)]
pub struct OutputProcessor {
    /// An answer of which nothing has come.
    fresh: AnswerText,
    /// The request's answers.
    answers: Vec<AnswerText>,
    /// Whether a token came that is none; the request's end has been told then.
    failed: bool,
}

impl OutputProcessor {
    /// A processor that shows every token, control tokens by their names, and looks for neither stop strings nor tool calls.
    #[must_use]
    pub fn new(tokenizer: &Arc<Tokenizer>) -> Self {
        Self {
            fresh: AnswerText {
                decoder: StreamDecoder::new(Arc::clone(tokenizer)),
                stops: StopStrings::default(),
                skip_special: false,
                parser: None,
                tokens: 0,
                stopped: false,
            },
            answers: Vec::new(),
            failed: false,
        }
    }

    /// Ends each answer where one of these strings comes; the answer's text ends before it. A control token's name is no
    /// text: no stop string is found in it or across it.
    ///
    /// # Errors
    /// A string without a character.
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

    /// Whether tool calls are looked for; where they are not, what is in them is text.
    #[must_use]
    pub fn tool_calls(mut self, wanted: bool) -> Self {
        self.fresh.parser = wanted.then(ToolCallParser::default);
        self
    }

    /// Gives an event to the client with what it adds to the text. Breaks at a token that ends its answer: a stop string is
    /// complete, or the token is none, and the request fails. What the engine computed of an answer after its stop string
    /// is left out, and not counted.
    pub fn process(&mut self, mut event: Event, client: &mut dyn FnMut(Output)) -> ControlFlow<()> {
        let (mut stopped, mut stop) = (false, None);
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
        });
        if stopped || self.failed {
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    }

    /// A sink for the engine that gives its events to `client` by this processor.
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
        if self.skip_special && !marks {
            token.special = None;
        }
        Ok(match &mut self.parser {
            Some(parser) => parser.push(&token),
            None => plain(token.to_string()),
        })
    }

    /// The answer's end: what was held back, which a stop string that becomes complete only now still ends.
    fn finish(&mut self, reason: &mut FinishReason, usage: &mut Usage) -> Vec<ToolCallEvent> {
        let mut text = String::new();
        if self.stopped {
            // Whatever else ended it in the same step, or later.
            *reason = FinishReason::Stop;
            usage.generated_tokens = self.tokens;
        } else {
            text = self.stops.finish(&self.decoder.finish());
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
