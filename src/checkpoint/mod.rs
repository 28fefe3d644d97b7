//! Model weights: a directory of safetensors shards or a GGUF, mapped and checked against the configuration.
//!
//! Opening maps the files and reads their headers; no weight is copied, and pages are read when they are first accessed.
//! Every tensor of [`ModelConfig::tensors`] must exist, with an accepted shape and dtype, and no other.
//!
//! Formats stay as on disk, and kernels widen them; only tensors that a GGUF stores in another form than the published one
//! (`A_log`, `kv_b_proj`) are converted when it is opened. Slicing weights and copying them to a device is done elsewhere.

pub mod blocks;
mod compressed;
mod contents;
mod encoded;
mod files;
mod fingerprint;
mod format;
pub mod ggml;
pub mod gguf;
mod header;
mod index;
mod map;
mod preset;
mod resaved;
mod tensor;
mod verify;

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

pub use blocks::{BlockFormat, Codes, Unpack};
pub use contents::FormatUse;
pub(crate) use encoded::encode;
pub use files::ModelFiles;
pub use fingerprint::Fingerprint;
pub use format::{FORMATS, Format};
pub use preset::Preset;
pub use tensor::TensorData;

use self::compressed::Repacked;
use crate::config::{ModelConfig, Role};
use crate::error::CheckpointError;

/// Tensors of at most so many bytes are copied out of files with others that are repacked: the pages around a small tensor, which
/// the system maps with it, would stay in memory beside the blocks.
const COPIED: usize = 1 << 20;

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
    /// Whether any tensor is repacked.
    repacks: bool,
    by_name: HashMap<String, usize>,
}

/// A mapped file, or a tensor made from one.
#[derive(Clone, Debug)]
struct Shard {
    path: PathBuf,
    bytes: Bytes,
    /// Whether the bytes are not those of the file.
    derived: bool,
}

impl Shard {
    fn mapped(path: PathBuf, bytes: Bytes) -> Self {
        Self {
            path,
            bytes,
            derived: false,
        }
    }

    fn derived(path: PathBuf, bytes: Bytes) -> Self {
        Self {
            path,
            bytes,
            derived: true,
        }
    }
}

/// The position of a tensor.
#[derive(Clone, Debug)]
struct Entry {
    name: String,
    format: Format,
    shape: Vec<usize>,
    shard: usize,
    range: Range<usize>,
    /// How the weight is computed, if its bytes are not in the file: `range` is empty then.
    repacked: Option<Arc<Repacked>>,
}

impl Entry {
    /// Size of the tensor in bytes as it is returned.
    fn bytes(&self) -> u64 {
        let shape = <[usize; 2]>::try_from(&self.shape[..]);
        let repacked = match (&self.repacked, shape) {
            (Some(_), Ok([rows, columns])) => self.format.bytes(rows, columns),
            _ => None,
        };
        repacked.unwrap_or(self.range.len()) as u64
    }
}

impl Checkpoint {
    /// Maps the checkpoint at `path` and checks it against `config`: a GGUF, as [`ModelFiles::open`] finds it, or a folder,
    /// in which `model.safetensors.index.json` is used if it exists, else `model.safetensors`, else every
    /// `model-*.safetensors`.
    ///
    /// # Errors
    /// [`CheckpointError`] names the file, the tensor, what was expected and what was found.
    pub fn open(path: &Path, config: &ModelConfig) -> Result<Checkpoint, CheckpointError> {
        ModelFiles::open(path)?.checkpoint(config)
    }

    /// A checkpoint in a folder of safetensors shards.
    fn of_folder(dir: &Path, config: &ModelConfig) -> Result<Checkpoint, CheckpointError> {
        let (shards, entries) = verify::open(dir, config)?;
        let tied = config.tie_word_embeddings;
        Ok(Checkpoint::of(dir.to_owned(), shards, entries, tied))
    }

    fn of(dir: PathBuf, shards: Vec<Shard>, entries: Vec<Entry>, tied: bool) -> Checkpoint {
        let mut by_name: HashMap<String, usize> = entries
            .iter()
            .enumerate()
            .map(|(i, e)| (e.name.clone(), i))
            .collect();
        if tied && let Some(&embedding) = by_name.get(Role::Embedding.pattern()) {
            by_name.insert(Role::Head.name(0), embedding);
        }
        Checkpoint {
            repacks: entries.iter().any(|entry| entry.repacked.is_some()),
            dir,
            shards,
            entries,
            by_name,
        }
    }

    /// The directory, or the GGUF.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A tensor by its published name. A tied output head is the embedding. A quantised tensor is repacked into blocks by
    /// this call.
    ///
    /// # Errors
    /// [`CheckpointError::NoSuchTensor`] if the configuration has no such tensor; for a quantised one also errors of reading
    /// its file.
    pub fn tensor(&self, name: &str) -> Result<TensorData, CheckpointError> {
        self.data(self.entry(name)?)
    }

    /// The format of a tensor, by its published name.
    ///
    /// # Errors
    /// [`CheckpointError::NoSuchTensor`].
    pub fn format(&self, name: &str) -> Result<Format, CheckpointError> {
        Ok(self.entry(name)?.format)
    }

    fn entry(&self, name: &str) -> Result<&Entry, CheckpointError> {
        let entry = self.by_name.get(name).and_then(|i| self.entries.get(*i));
        entry.ok_or_else(|| CheckpointError::NoSuchTensor {
            dir: self.dir.clone(),
            tensor: name.to_owned(),
        })
    }

    /// Every tensor, in the order of [`ModelConfig::tensors`].
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`].
    pub fn tensors(&self) -> impl Iterator<Item = Result<TensorData, CheckpointError>> {
        self.entries.iter().map(|entry| self.data(entry))
    }

    /// Every tensor in the order of names.
    fn sorted_by_name(&self) -> Vec<&Entry> {
        let mut entries: Vec<_> = self.entries.iter().collect();
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        entries
    }

    /// The bytes of a tensor as stored; of a quantised one codes and scales.
    ///
    /// Beside tensors that are repacked nothing is read through the shard's own mapping, whose pages would stay in memory beside
    /// the blocks: a system may map two megabytes around each byte that is read.
    fn stored(&self, entry: &Entry) -> Vec<Bytes> {
        let part = |(shard, range): (usize, Range<usize>)| {
            let shard = self.shards.get(shard)?;
            let window = if self.repacks && !shard.derived {
                map::window(shard, range.clone()).ok()
            } else {
                None
            };
            Some(window.unwrap_or_else(|| shard.bytes.slice(range)))
        };
        match &entry.repacked {
            Some(repacked) => repacked.stored().into_iter().filter_map(part).collect(),
            None => part((entry.shard, entry.range.clone()))
                .into_iter()
                .collect(),
        }
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no tensor; an opened checkpoint has some.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Size of all tensors in bytes, without headers; quantised ones count by their repacked size, unless a scale does not
    /// fit its format.
    pub fn total_bytes(&self) -> u64 {
        self.entries.iter().map(Entry::bytes).sum()
    }

    /// The formats of all tensors, each once, in alphabetical order.
    pub fn formats(&self) -> String {
        let names = self.entries.iter().map(|entry| entry.format.to_string());
        let names: BTreeSet<String> = names.collect();
        names.into_iter().collect::<Vec<_>>().join(", ")
    }

    /// The files, in the order of their names.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        let files = self.shards.iter().filter(|shard| !shard.derived);
        files.map(|shard| shard.path.as_path())
    }

    fn data(&self, entry: &Entry) -> Result<TensorData, CheckpointError> {
        let shard = self.shards.get(entry.shard);
        let shard = shard.ok_or_else(|| CheckpointError::NoSuchTensor {
            dir: self.dir.clone(),
            tensor: entry.name.clone(),
        })?;
        let (format, bytes) = match &entry.repacked {
            Some(repacked) => repacked.make(&self.shards)?,
            None if self.repacks && !shard.derived && entry.range.len() <= COPIED => {
                let window = map::window(shard, entry.range.clone())?;
                (entry.format, compressed::copied(&window))
            }
            None => (entry.format, shard.bytes.slice(entry.range.clone())),
        };
        Ok(TensorData {
            name: entry.name.clone(),
            format,
            shape: entry.shape.clone(),
            bytes,
            file: shard.path.clone(),
        })
    }
}
