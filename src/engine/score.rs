//! How likely a text is to a model: the negative log-likelihood of each token after the first.

use super::diagnose::diagnose;
use super::sequence::{Sequence, check_prompt};
use crate::backend::OutputRow;
use crate::checkpoint::Checkpoint;
use crate::error::Error;
use crate::model::{Model, Recording};

/// A text's likelihood.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// Tokens that were predicted: all but the first.
    pub predicted: usize,
    /// The sum of their negative log-likelihoods, in nats.
    pub negative_log_likelihood: f64,
}

impl Score {
    /// `exp` of the mean negative log-likelihood; nothing where nothing was predicted.
    #[must_use]
    pub fn perplexity(&self) -> Option<f64> {
        (self.predicted > 0).then(|| (self.negative_log_likelihood / self.predicted as f64).exp())
    }
}

/// What is told of each piece: the tokens done so far, and the piece's logits where they are kept.
pub type OnPiece<'a, E> = dyn FnMut(usize, &[f32]) -> Result<(), E> + 'a;

/// Scores `tokens`, in pieces as long as the model's step. `on_piece` is told the tokens done so far, and gets their
/// logits `[piece, vocabulary]` where `keep_rows` asks for them.
///
/// # Errors
/// A text that cannot run (empty, too long, ids outside the vocabulary), numbers that are not finite, a device that
/// fails, or what `on_piece` returns.
pub fn score<E: From<Error>>(
    model: &mut Model,
    checkpoint: &Checkpoint,
    tokens: &[u32],
    keep_rows: bool,
    on_piece: &mut OnPiece<'_, E>,
) -> Result<Score, E> {
    check_prompt(model.config(), tokens).map_err(Error::from)?;
    let recording = Recording {
        candidates: 1,
        keep_rows,
        probe_hidden: false,
    };
    let mut sequence = Sequence::new(model);
    let piece = sequence.model.limits().step.tokens;
    let mut step = sequence.record(piece, piece, recording)?;
    let mut negative_log_likelihood = 0.0;
    for chunk in tokens.chunks(piece) {
        let first = sequence.position;
        let wanted = (0..chunk.len())
            .map(|row| OutputRow {
                row,
                target: tokens.get(first + row + 1).copied(),
            })
            .collect();
        let output = sequence.advance(&mut *step, chunk, wanted)?;
        if output.choices.iter().any(|choice| !choice.finite) {
            let error = diagnose(sequence.model, checkpoint, &tokens[..first + chunk.len()])?;
            return Err(Error::from(error).into());
        }
        for choice in &output.choices {
            if let Some(logit) = choice.target_logit {
                negative_log_likelihood += f64::from(choice.log_normaliser) - f64::from(logit);
            }
        }
        on_piece(sequence.position, &output.logits)?;
    }
    Ok(Score {
        predicted: tokens.len() - 1,
        negative_log_likelihood,
    })
}
