//! GGUF, the container of llama.cpp: weights, configuration, tokenizer and chat template in one file, or in the parts of
//! a split one.
//!
//! Opening maps the files and reads their headers; metadata values are read when they are requested. No number of a header is
//! trusted: each is checked against the file before it is used.

mod config;
mod expand;
mod files;
mod header;
mod importance;
mod metadata;
mod overrides;
mod reader;
mod tensors;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests;
pub mod write;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bytes::Bytes;

pub use header::TensorInfo;
pub use importance::{Importance, ImportanceSums, Sums};
pub use metadata::Metadata;
pub use overrides::MetadataOverride;

use super::{Checkpoint, Shard};
use crate::config::{ModelConfig, Part, Role};
use crate::error::{CheckpointError, Error};

/// The supported architecture (`general.architecture`).
pub(crate) const ARCHITECTURE: &str = "kimi-linear";

/// An opened GGUF: one file, or all parts of a split one.
#[derive(Clone, Debug)]
pub struct Gguf {
    /// The path that was opened.
    path: PathBuf,
    /// The metadata of the first file.
    metadata: Metadata,
    files: Vec<Shard>,
    /// Every tensor of every file, with its index in `files`.
    tensors: BTreeMap<String, (usize, TensorInfo)>,
}

impl Gguf {
    /// Whether `path` is a GGUF: a file whose name or first bytes say so, or a folder with one and without safetensors
    /// weights.
    pub(super) fn is_at(path: &Path) -> bool {
        files::is_gguf(path)
    }

    /// Opens the file, all parts of the split file of which `path` is one, or the one model of a folder.
    ///
    /// # Errors
    /// [`CheckpointError`] says which file and where: an invalid header, a missing part, a file
    /// of another kind or of another model.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let parts = files::open(path)?;
        let metadata = parts.metadata;
        refuse_other_models(&metadata)?;
        let (mut files, mut tensors) = (Vec::new(), BTreeMap::new());
        for (shard, infos) in parts.files {
            let place = files.len();
            for info in infos {
                let name = info.name.clone();
                if tensors.insert(name.clone(), (place, info)).is_some() {
                    return Err(CheckpointError::Entry {
                        file: shard.path,
                        tensor: name,
                        expected: "each tensor in one part".to_owned(),
                        found: "it in an earlier part too".to_owned(),
                    });
                }
            }
            files.push(shard);
        }
        Ok(Self {
            path: path.to_owned(),
            metadata,
            files,
            tensors,
        })
    }

    /// The path that was opened: a file or a folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The metadata.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Overrides values of the file's metadata.
    pub(super) fn overrule(&mut self, overrides: &[MetadataOverride]) {
        self.metadata.overrule(overrides);
    }

    /// The tensors, by their names in the file.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.values().map(|(_, info)| info)
    }

    /// The part of the model that a tensor with this name in the file belongs to; `None` for a name of another model.
    pub fn part(&self, name: &str) -> Option<Part> {
        let mut words = name.splitn(3, '.');
        let layer = match (words.next(), words.next()) {
            (Some("blk"), Some(layer)) => layer.parse::<usize>().ok()?,
            _ => 0,
        };
        let named = |pattern: &str| pattern.replace("{i}", &layer.to_string()) == name;
        let kda = self.tensors.contains_key(&format!("blk.{layer}.ssm_a"));
        let found = Role::all().find(|role| {
            // Both kinds of attention use the same names for their query and output projections.
            let possible = match role.part() {
                Part::Kda => kda,
                Part::Mla => !kda,
                _ => true,
            };
            let values = *role == Role::MlaExpand && named(crate::config::gguf::VALUES);
            possible && (values || role.gguf().iter().any(|(pattern, _)| named(pattern)))
        });
        found.map(Role::part)
    }

    /// The configuration from the metadata, checked against the shapes of the tensors.
    ///
    /// # Errors
    /// A key that is missing, of another type or of another model; sizes that contradict each other.
    pub fn config(&self) -> Result<ModelConfig, Error> {
        config::model_config(self)
    }

    /// The weights, each accounted for.
    ///
    /// # Errors
    /// [`CheckpointError::Tensors`] lists tensors that are missing, have another shape or an unsupported type, or are
    /// unexpected.
    pub fn checkpoint(&self, config: &ModelConfig) -> Result<Checkpoint, CheckpointError> {
        let (shards, entries) = tensors::entries(self, config)?;
        Ok(Checkpoint::of(
            self.path.clone(),
            shards,
            entries,
            config.tie_word_embeddings,
        ))
    }

    /// The bytes of a tensor.
    fn bytes(&self, file: usize, info: &TensorInfo) -> Result<Bytes, CheckpointError> {
        match self.files.get(file) {
            Some(shard) => shard.slice(info.range.clone()),
            None => Ok(Bytes::new()),
        }
    }
}

/// Refuses a GGUF that does not hold the weights of this model, with what it is.
fn refuse_other_models(metadata: &Metadata) -> Result<(), CheckpointError> {
    let refused = |found: String| CheckpointError::NotThisModel {
        file: metadata.file().to_owned(),
        expected: format!("a model of architecture {ARCHITECTURE}"),
        found,
    };
    let kind = metadata.text("general.type")?.unwrap_or("model");
    let architecture = metadata.text("general.architecture")?;
    let found = match (kind, architecture) {
        ("model", Some(ARCHITECTURE)) => return Ok(()),
        ("adapter", _) => "an adapter (LoRA); merge it into its base model first".to_owned(),
        ("imatrix", _) => {
            "an importance matrix, which quantisers read; it holds no weights".to_owned()
        }
        ("mmproj", _) | (_, Some("clip")) => {
            "a projector of images (mmproj); this model reads text alone".to_owned()
        }
        ("model", Some("kimi-k3")) => {
            "kimi-k3, whose experts, residual attention and gates are others".to_owned()
        }
        ("model", Some(other)) => format!("architecture {other}, which this program does not run"),
        ("model", None) => "no general.architecture".to_owned(),
        (other, _) => format!("a GGUF of type {other}"),
    };
    Err(refused(found))
}
