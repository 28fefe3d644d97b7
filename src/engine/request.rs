//! What is asked of the engine.

use std::sync::Arc;

use super::grammar::Grammar;
use super::sampling::Sampling;
use crate::config::ModelConfig;
use crate::error::EngineError;
use crate::model::TraceChoice;

/// Names a request; whoever submits it chooses the number, and no two that are under way may have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// What is reported of the prompt itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PromptScores {
    /// Nothing.
    #[default]
    None,
    /// How likely each token after the first is.
    Likelihoods,
    /// That, and the logits at every position.
    Logits,
}

/// A prompt and what is to follow it.
#[derive(Clone, Debug)]
pub struct Request {
    /// The prompt's token ids.
    pub prompt: Vec<u32>,
    /// The most tokens to generate; the context may end before. With 0 the prompt runs and nothing follows.
    pub max_tokens: usize,
    /// Tokens that end the answer; they are not part of it.
    pub stop_ids: Vec<u32>,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// What every answer must follow; nothing is anything.
    pub grammar: Option<Arc<dyn Grammar>>,
    /// Answers to one prompt, drawn independently.
    pub samples: usize,
    /// Reports each token's log-probability, and those of so many of the likeliest tokens.
    pub logprobs: Option<usize>,
    /// Places in the prompt where a turn ends: a later prompt may part from this one there. The last few become cuts of
    /// the prompt, with a checkpoint at each.
    pub turn_ends: Vec<usize>,
    /// Whether cached prefixes are used, and this one's kept. Against a run that was cut at other places the result
    /// differs by rounding.
    pub reuse: bool,
    /// Reports what the model did with each token of the answer, and the memory of the chosen heads whole. Such a token
    /// takes a step of its own.
    pub trace: Option<TraceChoice>,
    /// With [`Request::trace`], traces the prompt's tokens from this place on too; they run one by one, in the form for
    /// decoding, and nothing after this place comes from the cache.
    pub trace_from: Option<usize>,
    /// What is reported of the prompt itself; it is then never taken from the cache.
    pub scores: PromptScores,
}

/// Turn ends that become cuts, the last ones: each costs a step of its own.
const MOST_TURN_CUTS: usize = 4;

impl Request {
    /// One greedy answer of at most `max_tokens` tokens.
    #[must_use]
    pub fn new(prompt: Vec<u32>, max_tokens: usize) -> Self {
        Self {
            prompt,
            max_tokens,
            stop_ids: Vec::new(),
            sampling: Sampling::GREEDY,
            grammar: None,
            samples: 1,
            logprobs: None,
            turn_ends: Vec::new(),
            reuse: true,
            trace: None,
            trace_from: None,
            scores: PromptScores::None,
        }
    }

    /// Checks what can be checked before anything runs, or a model is loaded.
    ///
    /// # Errors
    /// A prompt that cannot run, or a parameter outside its range.
    pub fn check(&self, config: &ModelConfig) -> Result<(), EngineError> {
        check_prompt(config, &self.prompt)?;
        self.sampling.check(config.vocab_size)?;
        let counts = [
            ("n", "from 1 to 128", self.samples, 1..=128),
            ("logprobs", "at most 64", self.logprobs.unwrap_or(0), 0..=64),
        ];
        for (parameter, expected, found, range) in counts {
            if !range.contains(&found) {
                let found = found as f64;
                return Err(EngineError::Sampling {
                    parameter,
                    expected,
                    found,
                });
            }
        }
        let outside = self
            .turn_ends
            .iter()
            .find(|turn| **turn > self.prompt.len());
        if let Some(turn) = outside {
            return Err(EngineError::TurnOutOfRange {
                turn: *turn,
                tokens: self.prompt.len(),
            });
        }
        Ok(())
    }

    /// Whether the prompt may go on from a cached prefix, and leave one.
    pub(super) fn prefix_caching_enabled(&self) -> bool {
        self.reuse && self.scores == PromptScores::None
    }

    /// Places inside the prompt where a segment always ends, ascending, whatever else runs.
    pub(super) fn cuts(&self) -> Vec<usize> {
        if !self.prefix_caching_enabled() {
            return Vec::new();
        }
        let mut cuts: Vec<usize> = self
            .turn_ends
            .iter()
            .copied()
            .filter(|turn| (1..self.prompt.len()).contains(turn))
            .collect();
        cuts.sort_unstable();
        cuts.dedup();
        cuts.split_off(cuts.len().saturating_sub(MOST_TURN_CUTS))
    }

    /// Number of tokens of the prompt before which a cached prefix may end.
    pub(super) fn reusable(&self) -> usize {
        match (self.trace, self.trace_from) {
            (Some(_), Some(from)) => self.prompt.len().min(from.saturating_add(1)),
            _ => self.prompt.len(),
        }
    }
}

/// Checks a prompt before any of it runs, or a model is loaded for it.
///
/// # Errors
/// An empty prompt, one longer than the context, or an id outside the vocabulary.
pub fn check_prompt(config: &ModelConfig, tokens: &[u32]) -> Result<(), EngineError> {
    if tokens.is_empty() {
        return Err(EngineError::EmptyPrompt);
    }
    let context = config.model_max_length;
    if tokens.len() > context {
        return Err(EngineError::PromptTooLong {
            tokens: tokens.len(),
            context,
        });
    }
    let outside = tokens
        .iter()
        .enumerate()
        .find(|(_, token)| **token as usize >= config.vocab_size);
    outside.map_or(Ok(()), |(position, token)| {
        let last = config.vocab_size - 1;
        Err(EngineError::TokenOutOfRange {
            token: *token,
            position,
            last,
        })
    })
}
