//! The engine's events of a request, in order. They carry token ids; an output processor turns these into text.

use std::ops::ControlFlow;
use std::sync::Arc;

use super::hand_off::HandOff;
use crate::error::Error;
use crate::model::TraceFrame;

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// A stop token or a stop string came, or a grammar was complete.
    Stop,
    /// `max_tokens` or the context was reached.
    Length,
    /// The client cancelled it.
    Cancelled,
}

/// Token counts of one answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Prompt tokens that came from the cache and were not computed.
    pub cached_tokens: usize,
    /// Tokens generated.
    pub generated_tokens: usize,
}

/// The probability of a generated token by the model's own distribution, before temperature and penalties.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// Its natural log-probability.
    pub logprob: f32,
    /// The most likely tokens with their log-probabilities, best first, as many as were requested.
    pub top: Vec<(u32, f32)>,
}

/// Scores of consecutive tokens of a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Scored {
    /// The position of the first of them in the prompt.
    pub first: usize,
    /// For each position the log-probability of the prompt's next token; `None` at its end.
    pub logprobs: Vec<Option<f32>>,
    /// For each position the most likely next tokens with their log-probabilities, best first, as many as the request asked
    /// for.
    pub top: Vec<Vec<(u32, f32)>>,
    /// The logits of each position, `[tokens, vocabulary]`, if they were requested.
    pub logits: Vec<f32>,
}

impl Scored {
    /// The scores of the positions from `position` on; `None` if there are none.
    #[must_use]
    pub fn after(mut self, position: usize) -> Option<Self> {
        let positions = self.logprobs.len();
        let before = position.saturating_sub(self.first).min(positions);
        if before == positions {
            return None;
        }
        let logits = self.logits.len() / positions;
        self.first += before;
        self.logprobs.drain(..before);
        self.top.drain(..before.min(self.top.len()));
        self.logits.drain(..before * logits);
        Some(self)
    }

    /// How likely each token of the prompt after the first scored position was; the prompt's end has none.
    pub fn token_logprobs(self) -> impl Iterator<Item = TokenLogprobs> {
        let each = self.logprobs.into_iter().zip(self.top);
        each.filter_map(|(logprob, top)| logprob.map(|logprob| TokenLogprobs { logprob, top }))
    }
}

/// What the engine says of a request.
#[derive(Clone, Debug)]
pub enum Event {
    /// The request was queued.
    Queued {
        /// Number of sequences that wait before it.
        ahead: usize,
    },
    /// A slot and blocks are reserved for caches that are imported ([`Engine::import`](super::Engine::import)).
    Reserved {
        /// Number of leading tokens whose latents are cached here, so that they need not be sent.
        have: usize,
    },
    /// Progress of the prompt.
    Prefill {
        /// Prompt tokens that have been computed, cached ones included.
        done: usize,
        /// Prompt tokens that came from the cache.
        cached: usize,
    },
    /// Scores of a segment of the prompt.
    Scored(Scored),
    /// The trace of a token of an answer. It comes before the token that was sampled from it.
    Trace {
        /// Which of the request's answers.
        sample: usize,
        /// The trace.
        frame: Box<TraceFrame>,
    },
    /// The next token of an answer.
    Token {
        /// Which of the request's answers.
        sample: usize,
        /// The token.
        id: u32,
        /// Its log-probability, if that was requested.
        logprobs: Option<TokenLogprobs>,
    },
    /// The first token of each answer of an export has been sampled ([`Engine::export`](super::Engine::export)): what the
    /// engine that continues needs in addition to the caches.
    HandOff(Box<HandOff>),
    /// An answer is complete. The last one of a request ends it.
    Finished {
        /// Which of the request's answers.
        sample: usize,
        /// Why.
        reason: FinishReason,
        /// The stop token that ended it.
        stop_token: Option<u32>,
        /// What it took.
        usage: Usage,
    },
    /// The request failed; no event follows.
    Failed(Arc<Error>),
}

/// Receives a request's events. It is called in the engine's thread between two steps and must not block. If it breaks at a
/// token, the answer ends there: see [`Engine::stop`](super::Engine::stop).
pub type Sink = Box<dyn FnMut(Event) -> ControlFlow<()> + Send>;
