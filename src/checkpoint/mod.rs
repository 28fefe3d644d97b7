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
use std::io::ErrorKind;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

pub use blocks::{BlockFormat, Codes, Unpack};
pub use contents::FormatUse;
pub(crate) use encoded::encode;
pub use files::ModelFiles;
pub use fingerprint::Fingerprint;
#[cfg(any(target_arch = "wasm32", test))]
pub(crate) use fingerprint::SAMPLE;
pub use format::{FORMATS, Format};
pub use preset::Preset;
pub use tensor::TensorData;

use self::compressed::Repacked;
use crate::config::{LayerBytes, ModelConfig, Role};
use crate::error::CheckpointError;

/// Tensors of at most so many bytes are copied out of files with others that are repacked: the pages around a small tensor, which
/// the system maps with it, would stay in memory beside the blocks.
const COPIED: usize = 1 << 20;

/// Number of bytes that headers are parsed from at first.
const HEADER: usize = 256 << 10;

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

/// A file of weights, or a tensor made from one.
#[derive(Clone, Debug)]
struct Shard {
    path: PathBuf,
    /// Size in bytes.
    length: usize,
    /// The bytes; those of a page's file are not here, but among the page's files.
    bytes: Bytes,
    /// Whether the bytes are not those of the file.
    derived: bool,
}

impl Shard {
    fn open(path: PathBuf) -> Result<Self, CheckpointError> {
        map::open(path)
    }

    fn derived(path: PathBuf, bytes: Bytes) -> Self {
        Self {
            path,
            length: bytes.len(),
            bytes,
            derived: true,
        }
    }

    /// Bytes that are inside the file.
    ///
    /// # Errors
    /// In a browser a range that is not in memory ([`crate::files::reading`]).
    fn slice(&self, range: Range<usize>) -> Result<Bytes, CheckpointError> {
        map::slice(self, range)
    }

    /// Parses the header from as few of the first bytes as it takes: [`ErrorKind::UnexpectedEof`] of `parse` asks for more.
    fn header<T>(
        &self,
        first: usize,
        parse: impl Fn(&Bytes) -> Result<T, CheckpointError>,
    ) -> Result<T, CheckpointError> {
        let mut known = first.min(self.length);
        loop {
            match parse(&self.slice(0..known)?) {
                Err(CheckpointError::Read { source, .. })
                    if source.kind() == ErrorKind::UnexpectedEof && known < self.length =>
                {
                    known = known.saturating_mul(4).min(self.length);
                }
                parsed => return parsed,
            }
        }
    }
}

/// The error of a header that goes on after the bytes that [`Shard::header`] has read.
fn goes_on(file: &Path) -> CheckpointError {
    CheckpointError::Read {
        file: file.to_owned(),
        source: ErrorKind::UnexpectedEof.into(),
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
        self.data(self.entry(name)?, false)
    }

    /// Tensors by their published names; `apart`, each in a mapping of its own, whose pages are released with it. Where files are read by ranges, all that are missing are asked for before the error.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`].
    pub(crate) fn tensors_named(
        &self,
        names: &[String],
        apart: bool,
    ) -> Result<Vec<TensorData>, CheckpointError> {
        let mut tensors = Vec::with_capacity(names.len());
        let mut missing = None;
        for name in names {
            match self.entry(name).and_then(|entry| self.data(entry, apart)) {
                Err(CheckpointError::Read { file, source })
                    if source.kind() == ErrorKind::WouldBlock =>
                {
                    missing = Some(CheckpointError::Read { file, source });
                }
                tensor => tensors.push(tensor?),
            }
        }
        missing.map_or(Ok(tensors), Err)
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
        self.entries.iter().map(|entry| self.data(entry, false))
    }

    /// Every tensor in the order of names.
    fn sorted_by_name(&self) -> Vec<&Entry> {
        let mut entries: Vec<_> = self.entries.iter().collect();
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        entries
    }

    /// The first and the last bytes of a tensor as stored, at most `most` of each; of a quantised one those of codes and scales.
    ///
    /// Nothing is read through the shard's own mapping, whose pages would stay in memory beside a device's copy or repacked blocks: a
    /// system may map two megabytes around each byte that is read.
    fn ends(&self, entry: &Entry, most: usize) -> Result<Vec<Bytes>, CheckpointError> {
        let parts = match &entry.repacked {
            Some(repacked) => repacked.stored(),
            None => vec![(entry.shard, entry.range.clone())],
        };
        let mut ends = Vec::with_capacity(2 * parts.len());
        for (shard, Range { start, end }) in parts {
            let shard = self.shard(shard, &entry.name)?;
            let length = most.min(end - start);
            for range in [start..start + length, end - length..end] {
                ends.push(match shard.derived {
                    true => shard.slice(range)?,
                    false => map::window(shard, range)?,
                });
            }
        }
        Ok(ends)
    }

    fn shard(&self, shard: usize, tensor: &str) -> Result<&Shard, CheckpointError> {
        let shard = self.shards.get(shard);
        shard.ok_or_else(|| CheckpointError::NoSuchTensor {
            dir: self.dir.clone(),
            tensor: tensor.to_owned(),
        })
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

    /// Size in bytes of the routed experts of each layer with experts, in their order, counted as in [`Checkpoint::total_bytes`].
    pub fn expert_bytes(&self, config: &ModelConfig) -> Vec<u64> {
        config.expert_bytes_of(self.entries.iter().map(Entry::bytes))
    }

    /// Size in bytes of the weights of each layer, counted as in [`Checkpoint::total_bytes`].
    pub fn layer_bytes(&self, config: &ModelConfig) -> Vec<LayerBytes> {
        config.layer_bytes_of(self.entries.iter().map(Entry::bytes))
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

    fn data(&self, entry: &Entry, apart: bool) -> Result<TensorData, CheckpointError> {
        let shard = self.shard(entry.shard, &entry.name)?;
        let (format, bytes) = match &entry.repacked {
            Some(repacked) => repacked.make(&self.shards)?,
            None if self.repacks && !shard.derived && entry.range.len() <= COPIED => {
                let window = map::window(shard, entry.range.clone())?;
                (entry.format, compressed::copied(&window))
            }
            None if apart && !shard.derived => {
                (entry.format, map::window(shard, entry.range.clone())?)
            }
            None => (entry.format, shard.slice(entry.range.clone())?),
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
