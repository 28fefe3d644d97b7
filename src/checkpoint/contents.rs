//! The formats of a model's weights, by part of the model, from headers alone.

use std::collections::BTreeMap;

use super::gguf::Gguf;
use super::{Checkpoint, ModelFiles, index};
use crate::config::{ModelConfig, Part, Role};
use crate::error::CheckpointError;

/// The tensors of one part of the model in one format.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct FormatUse {
    /// The part; `None` for tensors of no part.
    #[serde(serialize_with = "part_name")]
    pub part: Option<Part>,
    /// The format's name.
    pub format: String,
    /// Whether this program supports the format.
    pub is_read: bool,
    /// Number of tensors.
    pub tensors: usize,
    /// Number of weights.
    pub weights: u64,
    /// Size in bytes as stored; 0 for an unsupported format.
    pub bytes: u64,
    /// Bytes of it that one token reads at batch 1: the experts that it is routed to, one row of the embedding, all other
    /// weights.
    pub active_bytes: u64,
}

fn part_name<S: serde::Serializer>(part: &Option<Part>, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(part.map_or("unknown", Part::name))
}

/// A tensor as a header describes it.
struct Stored {
    part: Option<Part>,
    format: String,
    is_read: bool,
    weights: u64,
    bytes: u64,
}

impl ModelFiles {
    /// The formats of the weights, by part; `None` for a folder without weights.
    ///
    /// # Errors
    /// Weights in safetensors that are not those of `config`.
    pub fn contents(
        &self,
        config: &ModelConfig,
    ) -> Result<Option<Vec<FormatUse>>, CheckpointError> {
        let stored = match self {
            Self::Gguf(gguf) => of_gguf(gguf),
            Self::Folder(dir) if index::has_weights(dir) => {
                of_folder(&self.checkpoint(config)?, config)
            }
            Self::Folder(_) => return Ok(None),
        };
        let mut uses: BTreeMap<(Option<Part>, String), FormatUse> = BTreeMap::new();
        for tensor in stored {
            let key = (tensor.part, tensor.format.clone());
            let total = uses.entry(key).or_insert_with(|| FormatUse {
                part: tensor.part,
                format: tensor.format,
                is_read: tensor.is_read,
                tensors: 0,
                weights: 0,
                bytes: 0,
                active_bytes: 0,
            });
            total.tensors += 1;
            total.weights += tensor.weights;
            total.bytes += tensor.bytes;
        }
        let mut uses: Vec<FormatUse> = uses.into_values().collect();
        for total in &mut uses {
            let (read, of) = read_of(total.part, config);
            total.active_bytes = total.bytes / of as u64 * read as u64;
        }
        // Parts in the model's order, tensors of no part last; within a part the largest format first.
        uses.sort_by_key(|a| (a.part.is_none(), a.part, std::cmp::Reverse(a.bytes)));
        Ok(Some(uses))
    }
}

impl ModelFiles {
    /// Size in bytes of the routed experts of each layer with experts, in their order, as stored; `None` for a folder without
    /// weights.
    ///
    /// # Errors
    /// Weights in safetensors that are not those of `config`.
    pub fn expert_bytes(&self, config: &ModelConfig) -> Result<Option<Vec<u64>>, CheckpointError> {
        match self {
            Self::Gguf(gguf) => Ok(Some(experts_of_gguf(gguf, config))),
            Self::Folder(dir) if index::has_weights(dir) => {
                Ok(Some(self.checkpoint(config)?.expert_bytes(config)))
            }
            Self::Folder(_) => Ok(None),
        }
    }
}

/// Bytes of the stacks of experts in each layer.
fn experts_of_gguf(gguf: &Gguf, config: &ModelConfig) -> Vec<u64> {
    let layer = |layer: usize| {
        let patterns = Role::EXPERT.iter().flat_map(|role| role.gguf());
        let names = patterns.map(|(pattern, _)| pattern.replace("{i}", &layer.to_string()));
        let names: Vec<String> = names.collect();
        let stacks = gguf.tensors().filter(|info| names.contains(&info.name));
        stacks.map(|info| info.range.len() as u64).sum()
    };
    config.moe_layers().map(layer).collect()
}

/// The share of a part that one token reads, as a fraction.
fn read_of(part: Option<Part>, config: &ModelConfig) -> (usize, usize) {
    match part {
        Some(Part::Experts) => (config.num_experts_per_token, config.num_experts),
        // A tied embedding is also the output head, which reads all of it.
        Some(Part::Embedding) if !config.tie_word_embeddings => (1, config.vocab_size),
        _ => (1, 1),
    }
}

fn of_gguf(gguf: &Gguf) -> Vec<Stored> {
    let stored = gguf.tensors().map(|info| Stored {
        part: gguf.part(&info.name),
        format: info.ggml_type.name.to_owned(),
        is_read: info.ggml_type.format.is_some(),
        weights: info.shape.iter().map(|d| *d as u64).product(),
        bytes: info.range.len() as u64,
    });
    stored.collect()
}

/// Quantised weights are counted by their repacked size; none is repacked for this.
fn of_folder(checkpoint: &Checkpoint, config: &ModelConfig) -> Vec<Stored> {
    let stored = config.tensors().into_iter().zip(&checkpoint.entries);
    let stored = stored.map(|(spec, entry)| Stored {
        part: Some(spec.part),
        format: entry.format.to_string(),
        is_read: true,
        weights: spec.elements(),
        bytes: entry.bytes(),
    });
    stored.collect()
}
