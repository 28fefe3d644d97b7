//! The source of a model's weights: files, or random numbers generated on the device.

use std::collections::HashMap;

use crate::backend::Random;
use crate::checkpoint::{Checkpoint, Format};
use crate::config::{Dtype, ModelConfig, Role, Storage, TensorSpec};
use crate::error::BackendError;

/// The source of weights.
pub(super) enum Source<'a> {
    /// Files.
    Stored(&'a Checkpoint),
    /// Random numbers from the backend.
    Random {
        /// The seed.
        seed: u32,
        /// The dtype of each weight, by name.
        shapes: HashMap<String, TensorSpec>,
    },
}

/// The shape of a random weight, and the distribution of its numbers.
pub(super) struct Made {
    pub(super) format: Format,
    /// Rows of each tensor.
    pub(super) rows: Vec<usize>,
    pub(super) columns: usize,
    /// Bytes of all of them.
    pub(super) bytes: u64,
    pub(super) random: Random,
}

impl Source<'_> {
    pub(super) fn random(config: &ModelConfig, seed: u32) -> Self {
        // Tied models have no output head in their files; a random model gets one of its own.
        let untied = ModelConfig {
            tie_word_embeddings: false,
            ..config.clone()
        };
        let named = |spec: TensorSpec| (spec.name.clone(), spec);
        Self::Random {
            seed,
            shapes: untied.tensors().into_iter().map(named).collect(),
        }
    }

    /// The random weight in place of these tensors concatenated.
    pub(super) fn made(&self, names: &[String]) -> Result<Made, BackendError> {
        let Self::Random { seed, shapes } = self else {
            return Err(missing(&names[0]));
        };
        let find = |name: &String| shapes.get(name).ok_or_else(|| missing(name));
        let specs = names.iter().map(find).collect::<Result<Vec<_>, _>>()?;
        let columns = specs[0].shape.get(1).copied().unwrap_or(1);
        Ok(Made {
            format: match specs[0].storage {
                Storage::Single => Format::F32,
                Storage::Model => Format::BF16,
            },
            rows: specs.iter().map(|spec| spec.shape[0]).collect(),
            columns,
            bytes: specs.iter().map(|spec| spec.bytes(Dtype::Bf16)).sum(),
            random: numbers(specs[0], *seed, columns),
        })
    }
}

/// The distribution of a weight with this number of inputs: sums of products are about as large as their terms.
fn numbers(spec: &TensorSpec, seed: u32, inputs: usize) -> Random {
    let random = |exponent| Random::named(&spec.name, seed, exponent);
    match spec.role {
        // Rates of 1.5 to 11, as in a freshly initialised model.
        Role::KdaALog => random(0).about(1.4),
        // Steps of 0.002 to 0.08.
        Role::KdaDtBias => random(1).about(-4.5),
        Role::RouterBias => random(-7),
        _ if inputs == 1 => random(-2).about(1.0),
        _ => {
            // The variance of a uniform number is a third of the square of its bound.
            let bound = (3.0 / inputs.max(1) as f32).sqrt();
            random(bound.log2().floor() as i32)
        }
    }
}

fn missing(name: &str) -> BackendError {
    BackendError::Weight {
        name: name.to_owned(),
        what: "its place in the configuration",
        expected: "a shape".to_owned(),
        found: "none".to_owned(),
    }
}
