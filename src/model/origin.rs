//! The source of a loaded model's weights: its fingerprint, and the search for damaged weights.

use super::Model;
use super::source::Source;
use crate::checkpoint::{Checkpoint, Fingerprint};
use crate::config::{Role, TensorSpec};

/// The source of the weights of a loaded model.
pub(super) enum Origin {
    /// Files, which stay mapped.
    Stored(Checkpoint),
    /// Random numbers from this seed.
    Random(u32),
}

impl Origin {
    pub(super) fn of(source: &Source<'_>) -> Self {
        match source {
            Source::Stored(checkpoint) => Self::Stored((*checkpoint).clone()),
            Source::Random { seed, .. } => Self::Random(*seed),
        }
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
        match &self.origin {
            Origin::Stored(checkpoint) => Fingerprint::stored(checkpoint),
            Origin::Random(seed) => Fingerprint::random(&self.config, *seed),
        }
    }

    /// The formats in which its weights are stored, each once, in alphabetical order.
    #[must_use]
    pub fn weight_formats(&self) -> String {
        match &self.origin {
            Origin::Stored(checkpoint) => checkpoint.formats(),
            Origin::Random(_) => "random".to_owned(),
        }
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
        let Origin::Stored(checkpoint) = &self.origin else {
            return "where weights are random numbers that were never stored".to_owned();
        };
        let there = |spec: &TensorSpec| match part {
            ModelPart::Embedding => spec.layer.is_none() && spec.role == Role::Embedding,
            ModelPart::Layer(layer) => spec.layer == Some(layer),
            ModelPart::Head => spec.layer.is_none() && spec.role != Role::Embedding,
        };
        self.config
            .tensors()
            .into_iter()
            .filter(there)
            .filter_map(|spec| checkpoint.tensor(&spec.name).ok())
            .find_map(|tensor| tensor.first_non_finite().map(|found| (tensor, found)))
            .map_or_else(
                || "though all its weights are finite".to_owned(),
                |(tensor, (index, value))| {
                    let file = tensor.file.display();
                    let name = tensor.name;
                    format!("where {name} holds {value} at element {index} (in {file})")
                },
            )
    }
}
