//! The second pass over tokens whose logits were not finite: which layer, and which weight.
//!
//! The first pass only checks a flag when a token is chosen; this one reads every layer's residual stream back.

use super::sequence::Sequence;
use crate::backend::OutputRow;
use crate::checkpoint::Checkpoint;
use crate::error::{EngineError, Error};
use crate::model::{Model, Recording};

/// Runs `tokens` again from the start and names the first place where a number is not finite.
///
/// # Errors
/// A device that fails.
pub(super) fn diagnose(
    model: &mut Model,
    checkpoint: &Checkpoint,
    tokens: &[u32],
) -> Result<EngineError, Error> {
    let recording = Recording {
        candidates: 1,
        keep_rows: false,
        probe_hidden: true,
    };
    let layers = model.config().layers.len();
    let mut sequence = Sequence::new(model);
    let piece = sequence.model.limits().step.tokens;
    let mut step = sequence.record(piece, 1, recording)?;
    // The embedding, then each layer, then the head; the earliest of them over all pieces.
    let mut first = layers + 1;
    for tokens in tokens.chunks(piece) {
        let last = OutputRow {
            row: tokens.len() - 1,
            target: None,
        };
        let output = sequence.advance(&mut *step, tokens, vec![last])?;
        let bad = output.probes.iter().position(|probe| {
            probe
                .as_f32()
                .is_some_and(|values| values.iter().any(|value| !value.is_finite()))
        });
        if let Some(bad) = bad {
            first = bad;
            break;
        }
    }
    let (place, prefixes) = match first {
        0 => (
            "the embedding".to_owned(),
            vec!["model.embed_tokens.".to_owned()],
        ),
        place if place <= layers => (
            format!("layer {} (counted from 0)", place - 1),
            vec![format!("model.layers.{}.", place - 1)],
        ),
        _ => (
            "the output head".to_owned(),
            vec!["model.norm.".to_owned(), "lm_head.".to_owned()],
        ),
    };
    let blame = checkpoint
        .tensors()
        .filter(|tensor| {
            prefixes
                .iter()
                .any(|prefix| tensor.name.starts_with(prefix))
        })
        .find_map(|tensor| tensor.first_non_finite().map(|found| (tensor, found)))
        .map_or_else(
            || "though all its weights are finite".to_owned(),
            |(tensor, (index, value))| {
                format!(
                    "where {} holds {value} at element {index} (in {})",
                    tensor.name,
                    tensor.file.display()
                )
            },
        );
    Ok(EngineError::NonFinite { place, blame })
}
