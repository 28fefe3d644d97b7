//! What the engine says of a request, in order. It speaks token ids: text is made of them by an output processor.

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
    /// The client wanted no more.
    Cancelled,
}

/// What one answer took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of them that came from the cache and did not run.
    pub cached_tokens: usize,
    /// Tokens generated.
    pub generated_tokens: usize,
}

/// How likely a generated token was, by the model's own distribution, before temperature and penalties.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// Its natural log-probability.
    pub logprob: f32,
    /// The likeliest tokens with theirs, best first, as many as were asked for.
    pub top: Vec<(u32, f32)>,
}

/// Scores of consecutive tokens of a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Scored {
    /// The place of the first of them in the prompt.
    pub first: usize,
    /// At each place the log-probability of the prompt's next token; `None` at its end.
    pub logprobs: Vec<Option<f32>>,
    /// At each place the likeliest next tokens with their log-probabilities, best first, as many as the request asked for.
    pub top: Vec<Vec<(u32, f32)>>,
    /// The logits at each place, `[tokens, vocabulary]`, where they were asked for.
    pub logits: Vec<f32>,
}

impl Scored {
    /// How likely each token of the prompt after the first scored position was; the prompt's end has none.
    pub fn token_logprobs(self) -> impl Iterator<Item = TokenLogprobs> {
        let each = self.logprobs.into_iter().zip(self.top);
        each.filter_map(|(logprob, top)| logprob.map(|logprob| TokenLogprobs { logprob, top }))
    }
}

/// What the engine says of a request.
#[derive(Clone, Debug)]
pub enum Event {
    /// It waits, behind so many others.
    Queued {
        /// Sequences that wait before it.
        ahead: usize,
    },
    /// Slot and blocks are reserved for caches that come from elsewhere ([`Engine::import`](super::Engine::import)).
    Reserved {
        /// Tokens from the first on whose latents were kept here: they need not come.
        have: usize,
    },
    /// So many tokens of the prompt are through.
    Prefill {
        /// Tokens that are through, cached ones included.
        done: usize,
        /// Those that came from the cache.
        cached: usize,
    },
    /// Scores of a segment of the prompt.
    Scored(Scored),
    /// What the model did with a token of an answer; it comes before the token that it led to.
    Trace {
        /// Which of the request's answers.
        sample: usize,
        /// What it did.
        frame: Box<TraceFrame>,
    },
    /// The next token of an answer.
    Token {
        /// Which of the request's answers.
        sample: usize,
        /// The token.
        id: u32,
        /// How likely it was, where that was asked for.
        logprobs: Option<TokenLogprobs>,
    },
    /// The first token of each answer of an export is drawn ([`Engine::export`](super::Engine::export)): what the engine that
    /// goes on needs beside the caches.
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
    /// The request failed: nothing more comes.
    Failed(Arc<Error>),
}

/// Where a request's events go. It is called in the engine's thread between two steps and must not wait. Where it breaks
/// at a token, the answer ends there: see [`Engine::stop`](super::Engine::stop).
pub type Sink = Box<dyn FnMut(Event) -> ControlFlow<()> + Send>;
