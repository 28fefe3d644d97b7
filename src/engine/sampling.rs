//! How the tokens of an answer are sampled: penalties and biases change the logits first; suppressed tokens and tokens that a
//! grammar does not allow are removed; then temperature, top-k, top-p and min-p are applied, in that order.
//!
//! The device draws ([`Draw`]); this is what a draw is made of.

mod exact;

use std::collections::BTreeMap;
use std::sync::Arc;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::grammar::Guide;
use super::request::Request;
use crate::backend::{Draw, LogitChange};
use crate::error::EngineError;
pub(super) use exact::ExactSampling;

/// Sampling parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Temperature, which divides the logits; 0 is greedy.
    pub temperature: f64,
    /// Sample from the `top_k` most likely tokens; 0 turns this off.
    pub top_k: usize,
    /// Sample from the most likely tokens whose probabilities add up to this (nucleus sampling); 1 turns this off.
    pub top_p: f64,
    /// Sample from tokens with at least this fraction of the highest probability; 0 turns this off.
    pub min_p: f64,
    /// Repetition penalty: divides positive logits of tokens in the prompt or answer, and multiplies negative ones; 1 turns
    /// this off.
    pub repetition_penalty: f64,
    /// Presence penalty: subtracted from the logit of each token that occurs in the answer.
    pub presence_penalty: f64,
    /// Frequency penalty: subtracted once for each occurrence.
    pub frequency_penalty: f64,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f64)>,
    /// Random seed: the same seed and prompt give the same tokens.
    pub seed: u64,
}

impl Sampling {
    /// Greedy: the most likely token each time.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        logit_bias: Vec::new(),
        seed: 0,
    };

    /// Checks the range of every parameter, for a vocabulary of this size.
    ///
    /// # Errors
    /// The first parameter that is out of range.
    pub fn check(&self, vocabulary: usize) -> Result<(), EngineError> {
        let finite = |value: f64| value.is_finite();
        let rules = [
            (
                "temperature",
                "0 or more",
                self.temperature,
                self.temperature >= 0.0 && finite(self.temperature),
            ),
            (
                "top_p",
                "above 0 and at most 1",
                self.top_p,
                self.top_p > 0.0 && self.top_p <= 1.0,
            ),
            (
                "min_p",
                "from 0 to 1",
                self.min_p,
                (0.0..=1.0).contains(&self.min_p),
            ),
            (
                "repetition_penalty",
                "above 0",
                self.repetition_penalty,
                self.repetition_penalty > 0.0 && finite(self.repetition_penalty),
            ),
            (
                "presence_penalty",
                "a finite number",
                self.presence_penalty,
                finite(self.presence_penalty),
            ),
            (
                "frequency_penalty",
                "a finite number",
                self.frequency_penalty,
                finite(self.frequency_penalty),
            ),
        ];
        for (parameter, expected, found, holds) in rules {
            if !holds {
                return Err(EngineError::Sampling {
                    parameter,
                    expected,
                    found,
                });
            }
        }
        for (token, bias) in &self.logit_bias {
            if *token as usize >= vocabulary {
                return Err(EngineError::BiasOutOfRange {
                    token: *token,
                    last: vocabulary.saturating_sub(1),
                });
            }
            if !bias.is_finite() {
                let expected = "a finite number";
                return Err(EngineError::Sampling {
                    parameter: "logit_bias",
                    expected,
                    found: *bias,
                });
            }
        }
        Ok(())
    }

    /// Whether tokens of the prompt or the answer get other logits.
    fn penalises(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
    }

    /// The random number for a token of an answer, in units of 2^-32: a function of the seed, the answer and the number of
    /// its tokens before, so that it does not depend on what else runs.
    fn random(&self, answer: usize, position: u64) -> u32 {
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        random.set_stream(answer as u64);
        random.set_word_pos(u128::from(position));
        random.next_u32()
    }
}

/// The tokens that a model has, and which of them may be sampled.
#[derive(Clone, Debug)]
pub(super) struct Vocabulary {
    /// Number of logits of a row.
    size: usize,
    /// Bit mask of the tokens that are not suppressed; `None` if none is.
    allowed: Option<Arc<[u32]>>,
}

impl Vocabulary {
    /// A vocabulary whose tokens may all be sampled.
    pub(super) fn new(size: usize) -> Self {
        Self {
            size,
            allowed: None,
        }
    }

    /// The same, without these tokens.
    pub(super) fn suppressing(&self, tokens: &[u32]) -> Self {
        let mut bits = every(self.size);
        for token in tokens {
            if let Some(word) = bits.get_mut(*token as usize / 32) {
                *word &= !(1 << (token % 32));
            }
        }
        Self {
            allowed: (!tokens.is_empty()).then(|| bits.into()),
            ..*self
        }
    }

    /// The tokens that may be sampled, of those that a grammar allows.
    fn and(&self, grammar: &[u32]) -> Arc<[u32]> {
        let mut bits = every(self.size);
        for (i, word) in bits.iter_mut().enumerate() {
            let own = self.allowed.as_ref().map_or(u32::MAX, |allowed| allowed[i]);
            *word &= own & grammar.get(i).copied().unwrap_or(0);
        }
        bits.into()
    }
}

/// A bit mask of this number of tokens.
fn every(size: usize) -> Vec<u32> {
    let mut bits = vec![u32::MAX; size.div_ceil(32)];
    if let (Some(last), used @ 1..) = (bits.last_mut(), size % 32) {
        *last = (1 << used) - 1;
    }
    bits
}

/// What changes a token's logit.
#[derive(Clone, Copy, Debug, Default)]
struct TokenState {
    /// Whether it is in the prompt or the answer.
    seen: bool,
    /// Number of its occurrences in the answer.
    generated: u32,
    bias: f64,
}

/// The state that the next draw of one answer follows from.
pub(super) struct Sampler {
    sampling: Sampling,
    vocabulary: Vocabulary,
    /// Number of tokens of the answer.
    position: u64,
    /// Added to an answer's number.
    first_sample: usize,
    /// Tokens whose logits change.
    tokens: BTreeMap<u32, TokenState>,
    guide: Option<Box<dyn Guide>>,
    /// Whether the grammar allows no further token.
    complete: bool,
}

impl Sampler {
    /// A sampler at the start of an answer.
    fn new(sampling: &Sampling, vocabulary: &Vocabulary, prompt: &[u32]) -> Self {
        let mut tokens: BTreeMap<u32, TokenState> = BTreeMap::new();
        if sampling.repetition_penalty != 1.0 {
            for token in prompt {
                tokens.entry(*token).or_default().seen = true;
            }
        }
        for (token, bias) in &sampling.logit_bias {
            tokens.entry(*token).or_default().bias += bias;
        }
        Self {
            sampling: sampling.clone(),
            vocabulary: vocabulary.clone(),
            position: 0,
            first_sample: 0,
            tokens,
            guide: None,
            complete: false,
        }
    }

    /// The sampler of a request's answers, after the tokens that another engine generated.
    ///
    /// # Errors
    /// Tokens that the grammar does not allow.
    pub(super) fn of(request: &Request, vocabulary: &Vocabulary) -> Result<Self, EngineError> {
        let (prompt, answered) = request
            .prompt
            .split_at(request.prompt.len() - request.answered);
        let guide = request.grammar.as_ref().map(|grammar| grammar.guide());
        let mut sampler = Self::new(&request.sampling, vocabulary, prompt).guided(guide);
        sampler.first_sample = request.first_sample;
        for token in answered {
            sampler.take(*token)?;
        }
        Ok(sampler)
    }

    /// Constrains the tokens by a grammar.
    #[must_use]
    fn guided(mut self, guide: Option<Box<dyn Guide>>) -> Self {
        self.guide = guide;
        self
    }

    /// Whether the grammar allows no further token.
    pub(super) fn is_complete(&self) -> bool {
        self.complete
    }

    /// Whether the next draw is the same whatever token comes before it.
    pub(super) fn is_independent(&self) -> bool {
        self.guide.is_none() && !self.sampling.penalises()
    }

    /// The next draw of each of these answers, which have had the same tokens so far, from this output row; `ahead` is the number
    /// of tokens before it that have not been taken yet, which only an [independent](Self::is_independent) sampler can have.
    ///
    /// # Errors
    /// A grammar that cannot be followed further.
    pub(super) fn draws(
        &mut self,
        output: usize,
        answers: std::ops::Range<usize>,
        ahead: u64,
    ) -> Result<Vec<Draw>, EngineError> {
        let allowed = match &mut self.guide {
            Some(guide) => {
                let grammar = guide.allowed();
                let grammar = grammar.map_err(|reason| EngineError::Grammar { reason })?;
                Some(self.vocabulary.and(&grammar))
            }
            None => self.vocabulary.allowed.clone(),
        };
        let changes = self.changes();
        let sampling = &self.sampling;
        let draw = |answer| Draw {
            output,
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            random: sampling.random(self.first_sample + answer, self.position + ahead),
            allowed: allowed.clone(),
            changes: Arc::clone(&changes),
        };
        Ok(answers.map(draw).collect())
    }

    /// The changed logits, in the order of tokens.
    fn changes(&self) -> Arc<[LogitChange]> {
        let Sampling {
            repetition_penalty: repetition,
            presence_penalty: presence,
            frequency_penalty: frequency,
            ..
        } = self.sampling;
        let change = |(token, state): (&u32, &TokenState)| {
            let factor = if state.seen { repetition } else { 1.0 };
            let count = f64::from(state.generated);
            let penalty = presence * count.min(1.0) + frequency * count;
            LogitChange {
                token: *token,
                positive: finite(1.0 / factor),
                negative: finite(factor),
                add: finite(state.bias - penalty),
            }
        };
        self.tokens.iter().map(change).collect()
    }

    /// Adds a token to the answer: penalties count it, and the grammar advances by it.
    ///
    /// # Errors
    /// A token that the grammar does not allow.
    pub(super) fn take(&mut self, token: u32) -> Result<(), EngineError> {
        self.position += 1;
        if self.sampling.penalises() {
            let state = self.tokens.entry(token).or_default();
            state.seen = true;
            state.generated += 1;
        }
        if let Some(guide) = &mut self.guide {
            self.complete = guide
                .take(token)
                .map_err(|reason| EngineError::Grammar { reason })?;
        }
        Ok(())
    }
}

/// The nearest finite f32.
fn finite(value: f64) -> f32 {
    (value as f32).clamp(f32::MIN, f32::MAX)
}

#[cfg(test)]
mod tests;
