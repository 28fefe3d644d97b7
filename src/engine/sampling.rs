//! Sampling of the next token. Penalties and biases change the logits first; suppressed tokens and tokens that a grammar does
//! not allow are removed; then temperature, top-k, top-p and min-p are applied, in that order.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::grammar::{Guide, allows};
use crate::backend::Choice;
use crate::error::EngineError;

/// Largest number of candidates that is read back for a top-k; above it whole rows are read.
const MOST_CANDIDATES: usize = 64;

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

    /// Whether logits are changed before sampling.
    fn changes_logits(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
            || !self.logit_bias.is_empty()
    }

    /// Number of most likely tokens that suffice for sampling; `None` for all of them.
    fn best(&self) -> Option<usize> {
        match (self.temperature > 0.0, self.top_k) {
            (false, _) => Some(1),
            (true, 0) => None,
            (true, top_k) => Some(top_k),
        }
    }
}

/// Samples the tokens of one sequence.
pub struct Sampler {
    sampling: Sampling,
    random: ChaCha8Rng,
    /// Tokens of prompt and answer, for the repetition penalty.
    seen: HashSet<u32>,
    /// Number of occurrences of each token in the answer.
    generated: HashMap<u32, u32>,
    guide: Option<Box<dyn Guide>>,
    /// Tokens that are never sampled, ascending.
    suppressed: Arc<[u32]>,
    /// Whether the grammar allows no further token.
    complete: bool,
}

impl Sampler {
    /// A sampler at the start of its seed's random stream; the answers to one prompt have streams of their own.
    #[must_use]
    pub fn new(sampling: &Sampling, sample: usize, prompt: &[u32]) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(sampling.seed);
        random.set_stream(sample as u64);
        let seen = if sampling.repetition_penalty == 1.0 {
            HashSet::new()
        } else {
            prompt.iter().copied().collect()
        };
        Self {
            sampling: sampling.clone(),
            random,
            seen,
            generated: HashMap::new(),
            guide: None,
            suppressed: Arc::default(),
            complete: false,
        }
    }

    /// Suppresses these tokens, which are ascending.
    #[must_use]
    pub fn suppressing(mut self, tokens: Arc<[u32]>) -> Self {
        self.suppressed = tokens;
        self
    }

    /// Constrains the tokens by a grammar. Sampling needs whole rows then.
    #[must_use]
    pub fn guided(mut self, guide: Option<Box<dyn Guide>>) -> Self {
        self.guide = guide;
        self
    }

    /// Number of candidates that suffice even if every suppressed token is among them; `None` if the whole row is needed.
    fn enough_candidates(&self) -> Option<usize> {
        if self.guide.is_some() || self.sampling.changes_logits() {
            return None;
        }
        let wanted = self.sampling.best()?.saturating_add(self.suppressed.len());
        (wanted <= MOST_CANDIDATES).then_some(wanted)
    }

    /// Number of candidates to read back for each token.
    #[must_use]
    pub fn candidates(&self) -> usize {
        self.enough_candidates().unwrap_or(1)
    }

    /// Whether whole rows must be read back.
    #[must_use]
    pub fn needs_full_logits(&self) -> bool {
        self.enough_candidates().is_none()
    }

    /// Whether the grammar allows no further token.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// Samples the next token from a row's candidates, or from the whole row if [`Sampler::needs_full_logits`].
    ///
    /// # Errors
    /// A grammar that cannot be followed further.
    pub fn choose(&mut self, choice: &Choice, row: &[f32]) -> Result<u32, EngineError> {
        let token = if let Some(guide) = &mut self.guide {
            let bits = guide
                .allowed()
                .map_err(|reason| EngineError::Grammar { reason })?;
            let mut logits = self.changed(row);
            logits.retain(|(token, _)| allows(&bits, *token));
            if logits.is_empty() {
                let reason = "it allows no token that the model has".to_owned();
                return Err(EngineError::Grammar { reason });
            }
            self.draw(logits)
        } else if self.needs_full_logits() {
            let logits = self.changed(row);
            self.draw(logits)
        } else {
            let candidates = choice.candidates.iter();
            let candidates = candidates.filter(|(token, _)| !self.is_suppressed(*token));
            let candidates = candidates.map(|(token, logit)| (*token, f64::from(*logit)));
            self.draw(candidates.collect())
        };
        self.record(token)?;
        Ok(token)
    }

    /// Takes over a token that another sampler with the same parameters, answer and prompt sampled, whose random stream is at
    /// `random_position` after it: this sampler continues as that one would.
    ///
    /// # Errors
    /// A token that the grammar does not allow.
    pub fn take_over(&mut self, token: u32, random_position: u64) -> Result<(), EngineError> {
        self.random.set_word_pos(u128::from(random_position));
        self.record(token)
    }

    /// Position of the random stream: the number of 32-bit words drawn from it.
    #[must_use]
    pub fn random_position(&self) -> u64 {
        // 2^64 words would take centuries.
        u64::try_from(self.random.get_word_pos()).unwrap_or(u64::MAX)
    }

    /// Adds a token to the answer: penalties count it, and the grammar advances by it.
    fn record(&mut self, token: u32) -> Result<(), EngineError> {
        if self.sampling.changes_logits() {
            if self.sampling.repetition_penalty != 1.0 {
                self.seen.insert(token);
            }
            *self.generated.entry(token).or_insert(0) += 1;
        }
        if let Some(guide) = &mut self.guide {
            self.complete = guide
                .take(token)
                .map_err(|reason| EngineError::Grammar { reason })?;
        }
        Ok(())
    }

    fn is_suppressed(&self, token: u32) -> bool {
        self.suppressed.binary_search(&token).is_ok()
    }

    /// The row after penalties and biases, without suppressed tokens.
    fn changed(&self, row: &[f32]) -> Vec<(u32, f64)> {
        let mut logits: Vec<(u32, f64)> = (0..).zip(row.iter().copied().map(f64::from)).collect();
        for token in &self.seen {
            if let Some((_, logit)) = logits.get_mut(*token as usize) {
                let penalty = self.sampling.repetition_penalty;
                *logit = if *logit > 0.0 {
                    *logit / penalty
                } else {
                    *logit * penalty
                };
            }
        }
        for (token, count) in &self.generated {
            if let Some((_, logit)) = logits.get_mut(*token as usize) {
                *logit -= self.sampling.presence_penalty
                    + self.sampling.frequency_penalty * f64::from(*count);
            }
        }
        for (token, bias) in &self.sampling.logit_bias {
            if let Some((_, logit)) = logits.get_mut(*token as usize) {
                *logit += bias;
            }
        }
        if !self.suppressed.is_empty() {
            logits.retain(|(token, _)| !self.is_suppressed(*token));
        }
        logits
    }

    fn draw(&mut self, mut candidates: Vec<(u32, f64)>) -> u32 {
        // Of equal logits the lower id comes first.
        let better = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        let Sampling {
            temperature,
            top_k,
            top_p,
            min_p,
            ..
        } = self.sampling;
        let Some(&(best, greatest)) = candidates.iter().min_by(|a, b| better(a, b)) else {
            return 0;
        };
        if temperature == 0.0 {
            return best;
        }
        if top_k > 0 && top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k, better);
            candidates.truncate(top_k);
        }
        // Logits become probabilities that need not sum to 1: the highest one is 1.
        for candidate in &mut candidates {
            candidate.1 = ((candidate.1 - greatest) / temperature).exp();
        }
        let total: f64 = candidates.iter().map(|candidate| candidate.1).sum();
        candidates.retain(|candidate| candidate.1 >= min_p);
        // Draws must not depend on the order of candidates; whole rows come in the order of ids.
        if top_p < 1.0 || top_k > 0 {
            candidates.sort_unstable_by(better);
        }
        let mut reached = 0.0;
        let kept = candidates.iter().take_while(|candidate| {
            let keep = reached < top_p * total;
            reached += candidate.1;
            keep
        });
        let kept = kept.count().max(1);
        let total: f64 = candidates[..kept].iter().map(|candidate| candidate.1).sum();
        let mut left = self.random.random::<f64>() * total;
        for candidate in &candidates[..kept] {
            left -= candidate.1;
            if left < 0.0 {
                return candidate.0;
            }
        }
        best
    }
}

#[cfg(test)]
mod tests;
