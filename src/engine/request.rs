//! A request to the engine.

use std::sync::Arc;

use super::grammar::Grammar;
use super::sampling::Sampling;
use super::undo::UndoWrite;
use crate::config::ModelConfig;
use crate::error::EngineError;
use crate::model::TraceChoice;

/// Identifies a request. The caller chooses the number, which must be unique among unfinished requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// What is reported about the prompt itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PromptScores {
    /// Nothing.
    #[default]
    None,
    /// The log-probability of each token after the first.
    Likelihoods,
    /// The same, and the logits of every position.
    Logits,
}

/// A prompt and what to generate after it.
#[derive(Clone, Debug)]
pub struct Request {
    /// The prompt's token ids.
    pub prompt: Vec<u32>,
    /// Maximum number of tokens to generate; the context may end before. With 0 only the prompt is computed.
    pub max_tokens: usize,
    /// Tokens that end the answer; they are not part of it.
    pub stop_ids: Vec<u32>,
    /// The sampling parameters.
    pub sampling: Sampling,
    /// Grammar that constrains the answers; `None` for no constraint.
    pub grammar: Option<Arc<dyn Grammar>>,
    /// Number of answers to the prompt, sampled independently.
    pub samples: usize,
    /// The number of its first answer among those of a larger request of which this is a part: random numbers depend on it.
    /// Usually 0.
    pub first_sample: usize,
    /// How many of the prompt's last tokens are the first tokens of the answer, which another engine generated: penalties,
    /// random numbers and the grammar continue after them. Usually 0; otherwise there is one answer.
    pub answered: usize,
    /// Number of most likely tokens to report with their log-probabilities, in addition to each token's own; `None` reports
    /// none. Frames of a trace have them too, also for the prompt's tokens.
    pub logprobs: Option<usize>,
    /// Lower values are admitted and prefilled first; where slots or blocks are short, the highest leave the device first. Usually 0.
    pub priority: i64,
    /// Positions in the prompt where a turn ends: a later prompt may differ from this one from there on. The last few become
    /// cuts of the prompt, with a checkpoint at each.
    pub turn_ends: Vec<usize>,
    /// Whether to use cached prefixes and to cache this one. Compared with a run that was cut at other positions the result
    /// differs by rounding.
    pub reuse: bool,
    /// Traces each token of the answer, with the full state of the chosen heads. Such a token takes a step of its own.
    pub trace: Option<TraceChoice>,
    /// With [`Request::trace`], also traces the prompt's tokens from this position on. They run one by one, in the decode
    /// form, and no cached prefix beyond this position is used.
    pub trace_from: Option<usize>,
    /// Writes of the prompt's tokens that are taken out of the state again: the tokens after each run from the state without it.
    /// Such a token takes a step of its own. No cached prefix beyond the first of them is used, and the sequence is not cached:
    /// its states and latents are not those of its tokens.
    pub undo: Vec<UndoWrite>,
    /// What is reported about the prompt itself; unless it is nothing, the prompt is not taken from the cache.
    pub scores: PromptScores,
}

/// Number of turn ends that become cuts, the last ones: each cut costs a step of its own.
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
            first_sample: 0,
            answered: 0,
            logprobs: None,
            priority: 0,
            turn_ends: Vec::new(),
            reuse: true,
            trace: None,
            trace_from: None,
            undo: Vec::new(),
            scores: PromptScores::None,
        }
    }

    /// Checks what can be checked before any computation, or before a model is loaded.
    ///
    /// # Errors
    /// A prompt that cannot run, or a parameter out of range.
    pub fn check(&self, config: &ModelConfig) -> Result<(), EngineError> {
        check_prompt(config, &self.prompt)?;
        self.sampling.check(config.vocab_size)?;
        let answered = match self.samples {
            1 => self.prompt.len() - 1,
            _ => 0,
        };
        let counts = [
            ("n", "from 1 to 128", self.samples, 1..=128),
            (
                "answered",
                "of one answer, and fewer than all tokens",
                self.answered,
                0..=answered,
            ),
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

    /// Whether the prompt may continue from a cached prefix.
    pub(super) fn prefix_caching_enabled(&self) -> bool {
        self.reuse && self.scores == PromptScores::None
    }

    /// Whether its states and latents may be cached.
    pub(super) fn cacheable(&self) -> bool {
        self.prefix_caching_enabled() && self.undo.is_empty()
    }

    /// Positions inside the prompt where a segment always ends, ascending, independent of the rest of the batch.
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

    /// Number of leading tokens of the prompt within which a cached prefix may end.
    pub(super) fn reusable(&self) -> usize {
        let traced = self.trace.and(self.trace_from);
        let alone = self.undo.iter().map(|write| write.token).chain(traced);
        alone.fold(self.prompt.len(), |reusable, from| {
            reusable.min(from.saturating_add(1))
        })
    }
}

/// Checks a prompt before any computation, or before a model is loaded for it.
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
