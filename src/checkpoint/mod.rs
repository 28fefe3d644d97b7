//! Where weights come from: a directory of safetensors shards, mapped and checked against the configuration.
//!
//! Opening maps the files and reads their headers; no weight is copied, and pages are read when somebody touches them.
//! Every tensor of [`ModelConfig::tensors`] must be there, in an accepted shape and dtype, and no other.
//!
//! It converts nothing: dtypes stay as they are on disk, and kernels widen. It is not where weights are sliced or sent to
//! a device.

pub mod blocks;
mod fingerprint;
mod format;
pub mod ggml;
mod header;
mod index;
mod map;
mod resaved;
mod tensor;
mod verify;

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use bytes::Bytes;

pub use blocks::{BlockFormat, Codes, Unpack};
pub use fingerprint::Fingerprint;
pub use format::{FORMATS, Format};
pub use tensor::TensorData;

use crate::config::{ModelConfig, Role};
use crate::error::CheckpointError;

/// An opened checkpoint: every tensor is there.
///
/// The files are mapped, not read: they must neither be rewritten nor shortened while the checkpoint, or any
/// [`TensorData`] of it, lives.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    shards: Vec<Shard>,
    /// In the order of [`ModelConfig::tensors`].
    entries: Vec<Entry>,
    by_name: HashMap<String, usize>,
}

/// A mapped file.
#[derive(Clone, Debug)]
struct Shard {
    path: PathBuf,
    bytes: Bytes,
}

/// Where a tensor lies.
#[derive(Clone, Debug)]
struct Entry {
    name: String,
    format: Format,
    shape: Vec<usize>,
    shard: usize,
    range: Range<usize>,
}

impl Checkpoint {
    /// Maps the checkpoint in `dir` and checks it against `config`. `model.safetensors.index.json` is what counts if it is
    /// there, else `model.safetensors`, else every `model-*.safetensors`.
    ///
    /// # Errors
    /// [`CheckpointError`] names the file, the tensor, what was expected and what was found.
    pub fn open(dir: &Path, config: &ModelConfig) -> Result<Checkpoint, CheckpointError> {
        let (shards, entries) = verify::open(dir, config)?;
        let mut by_name: HashMap<String, usize> = entries
            .iter()
            .enumerate()
            .map(|(i, e)| (e.name.clone(), i))
            .collect();
        if config.tie_word_embeddings
            && let Some(&embedding) = by_name.get(Role::Embedding.pattern())
        {
            by_name.insert(Role::Head.name(0), embedding);
        }
        Ok(Checkpoint {
            dir: dir.to_owned(),
            shards,
            entries,
            by_name,
        })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A tensor by its published name. The head's is the embedding where the two are tied.
    ///
    /// # Errors
    /// [`CheckpointError::NoSuchTensor`] if the configuration has no such tensor.
    pub fn tensor(&self, name: &str) -> Result<TensorData, CheckpointError> {
        self.by_name
            .get(name)
            .and_then(|i| self.entries.get(*i))
            .and_then(|e| self.data(e))
            .ok_or_else(|| CheckpointError::NoSuchTensor {
                dir: self.dir.clone(),
                tensor: name.to_owned(),
            })
    }

    /// Every tensor, in the order of [`ModelConfig::tensors`].
    pub fn tensors(&self) -> impl Iterator<Item = TensorData> {
        self.entries.iter().filter_map(|e| self.data(e))
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no tensor; an opened checkpoint has some.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Bytes of all tensors, headers not counted.
    pub fn total_bytes(&self) -> u64 {
        self.entries.iter().map(|e| e.range.len() as u64).sum()
    }

    /// The shards, in the order of their names.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.shards.iter().map(|s| s.path.as_path())
    }

    fn data(&self, entry: &Entry) -> Option<TensorData> {
        let shard = self.shards.get(entry.shard)?;
        Some(TensorData {
            name: entry.name.clone(),
            format: entry.format,
            shape: entry.shape.clone(),
            bytes: shard.bytes.slice(entry.range.clone()),
            file: shard.path.clone(),
        })
    }
}
