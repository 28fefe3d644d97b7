//! The likelihood of a text: the negative log-likelihood of each token after the first.

use super::event::Scored;

/// The sums over a text's log-probabilities.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Score {
    /// Number of predicted tokens: all but the first.
    pub predicted: usize,
    /// The sum of their negative log-likelihoods, in nats.
    pub negative_log_likelihood: f64,
}

impl Score {
    /// Adds the scores of further tokens.
    pub fn add(&mut self, scored: &Scored) {
        for logprob in scored.logprobs.iter().flatten() {
            self.predicted += 1;
            self.negative_log_likelihood -= f64::from(*logprob);
        }
    }

    /// `exp` of the mean negative log-likelihood; `None` if no token was predicted.
    #[must_use]
    pub fn perplexity(&self) -> Option<f64> {
        (self.predicted > 0).then(|| (self.negative_log_likelihood / self.predicted as f64).exp())
    }
}
