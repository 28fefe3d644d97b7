//! The source of a loaded model's weights: its fingerprint, and the search for damaged weights.

use super::Model;
use super::source::Source;
use crate::checkpoint::{Checkpoint, Fingerprint};
use crate::config::{ModelConfig, Role, TensorSpec};
use crate::error::CheckpointError;
use crate::files;

/// The source of the weights of a loaded model.
pub(super) struct Origin {
    fingerprint: Fingerprint,
    /// The files, which stay mapped; `None` for random numbers.
    stored: Option<Checkpoint>,
}

impl Origin {
    pub(super) async fn of(
        source: &Source<'_>,
        config: &ModelConfig,
    ) -> Result<Self, CheckpointError> {
        Ok(match source {
            Source::Stored(checkpoint) => Self {
                fingerprint: files::reading(|| Fingerprint::stored(checkpoint)).await?.0,
                stored: Some((*checkpoint).clone()),
            },
            Source::Random { seed, .. } => Self {
                fingerprint: Fingerprint::random(config, *seed),
                stored: None,
            },
        })
    }
}

/// A part of the forward pass, in the order of the probes of [`StepOptions::probe_hidden`](super::StepOptions).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModelPart {
    /// The embedding.
    Embedding,
    /// A layer, counted from 0.
    Layer(usize),
    /// The final norm and the output head.
    Head,
}

impl std::fmt::Display for ModelPart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Embedding => f.write_str("the embedding"),
            Self::Layer(layer) => write!(f, "layer {layer} (counted from 0)"),
            Self::Head => f.write_str("the output head"),
        }
    }
}

impl Model {
    /// The model's fingerprint: the same on every backend and on every rank.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        self.origin.fingerprint
    }

    /// The formats in which its weights are stored, each once, in alphabetical order.
    #[must_use]
    pub fn weight_formats(&self) -> String {
        let stored = self.origin.stored.as_ref();
        stored.map_or_else(|| "random".to_owned(), Checkpoint::formats)
    }

    /// The part that the probe with this index belongs to.
    #[must_use]
    pub fn part(&self, probe: usize) -> ModelPart {
        match probe.checked_sub(1) {
            None => ModelPart::Embedding,
            Some(layer) if layer < self.layers.len() => ModelPart::Layer(layer),
            Some(_) => ModelPart::Head,
        }
    }

    /// Describes the weights of a part whose values are not finite, for an error: the first damaged weight, or that all are
    /// finite.
    #[must_use]
    pub fn damaged_weight(&self, part: ModelPart) -> String {
        let Some(checkpoint) = &self.origin.stored else {
            return "where weights are random numbers that were never stored".to_owned();
        };
        let there = |spec: &TensorSpec| match part {
            ModelPart::Embedding => spec.layer.is_none() && spec.role == Role::Embedding,
            ModelPart::Layer(layer) => spec.layer == Some(layer),
            ModelPart::Head => spec.layer.is_none() && spec.role != Role::Embedding,
        };
        for spec in self.config.tensors().iter().filter(|spec| there(spec)) {
            let tensor = match checkpoint.tensor(&spec.name) {
                Ok(tensor) => tensor,
                Err(error) => return format!("whose weights could not be looked at: {error}"),
            };
            if let Some((index, value)) = tensor.first_non_finite() {
                let (name, file) = (tensor.name, tensor.file.display());
                return format!("where {name} holds {value} at element {index} (in {file})");
            }
        }
        "though all its weights are finite".to_owned()
    }
}
