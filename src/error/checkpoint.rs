//! What can be wrong with the checkpoint.

use std::path::{Path, PathBuf};

/// What can be wrong with the checkpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// There is no such directory.
    #[error("{}: expected a directory with a checkpoint, found {found}", dir.display())]
    NoDirectory {
        /// The directory asked for.
        dir: PathBuf,
        /// What is there instead.
        found: &'static str,
    },
    /// The directory holds no weights.
    #[error("{}: no weights: expected model.safetensors.index.json, model.safetensors or model-*.safetensors, found {found}", dir.display())]
    NoWeights {
        /// The directory.
        dir: PathBuf,
        /// What is there instead.
        found: String,
    },
    /// A file cannot be opened, mapped or read.
    #[error("{}: cannot be read: {source}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// `model.safetensors.index.json` is not what it should be.
    #[error("{}: expected {expected}, found {found}", file.display())]
    Index {
        /// The index.
        file: PathBuf,
        /// What belongs there.
        expected: &'static str,
        /// What is there.
        found: String,
    },
    /// The index names a shard that is not there.
    #[error("{}: missing: {} names it for {tensors} tensors, among them {tensor}", file.display(), name(index))]
    ShardMissing {
        /// The shard.
        file: PathBuf,
        /// The index.
        index: PathBuf,
        /// How many tensors should be in it.
        tensors: usize,
        /// One of them.
        tensor: String,
    },
    /// There is no index, and the names of the shards say that one is missing.
    #[error("{}: missing: {other}, which is there, is one of a set of shards that has it", file.display())]
    ShardUnnamed {
        /// The shard.
        file: PathBuf,
        /// A shard of the same set.
        other: String,
    },
    /// There is an adapter, which would have to be applied to the weights.
    #[error(
        "{}: adapters are not applied: expected a model alone; merge it into its base model and save that (peft: \
         merge_and_unload, save_pretrained), or use a folder without it",
        file.display()
    )]
    Adapter {
        /// The adapter's file.
        file: PathBuf,
    },
    /// A file is what Git keeps in place of a large one.
    #[error(
        "{}: expected the weights, found a Git LFS pointer to {size}: `git lfs pull` in its folder fetches them",
        file.display()
    )]
    LfsPointer {
        /// The pointer.
        file: PathBuf,
        /// The size that the pointer says, in words.
        size: String,
    },
    /// A shard is shorter or longer than its header says.
    #[error(
        "{}: {}: the header says {expected} bytes, the file has {found}",
        file.display(),
        if found < expected { "truncated" } else { "too long" }
    )]
    Length {
        /// The shard.
        file: PathBuf,
        /// Bytes by the header, the header included.
        expected: u64,
        /// Bytes of the file.
        found: u64,
    },
    /// A shard's header cannot be understood.
    #[error("{}: header: expected {expected}, found {found}", file.display())]
    Header {
        /// The shard.
        file: PathBuf,
        /// What belongs there.
        expected: String,
        /// What is there.
        found: String,
    },
    /// One tensor's entry in a header is wrong.
    #[error("{}: tensor {tensor}: expected {expected}, found {found}", file.display())]
    Entry {
        /// The shard.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// What belongs there.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A value of a GGUF's metadata is missing or is not what it should be.
    #[error("{}: {key}: expected {expected}, found {found}", file.display())]
    Metadata {
        /// The file.
        file: PathBuf,
        /// The key.
        key: String,
        /// What belongs there.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A value that is to be read in place of one of a GGUF's metadata cannot be.
    #[error("override {given}: expected {expected}, found {found}")]
    Override {
        /// The override as it was given, or its key.
        given: String,
        /// What belongs there.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A GGUF that is no model of ours, or not the whole of one.
    #[error("{}: expected {expected}, found {found}", file.display())]
    NotThisModel {
        /// The file or folder.
        file: PathBuf,
        /// What would be read.
        expected: String,
        /// What is there, and what to do.
        found: String,
    },
    /// A weight cannot be quantised.
    #[error("{tensor}: cannot be quantised: expected {expected}, found {found}")]
    NotQuantized {
        /// The weight.
        tensor: String,
        /// What a quantiser needs.
        expected: String,
        /// What is there.
        found: String,
    },
    /// The tensors are not those that the configuration describes.
    #[error("{}: {} with the tensors:{}", dir.display(), count(problems.len()), list(problems))]
    Tensors {
        /// The directory.
        dir: PathBuf,
        /// Each problem in words, named by its tensor.
        problems: Vec<String>,
    },
    /// A tensor was asked for that the configuration does not have.
    #[error("{}: no tensor {tensor} in this model", dir.display())]
    NoSuchTensor {
        /// The directory.
        dir: PathBuf,
        /// The name asked for.
        tensor: String,
    },
}

/// How many problems a message lists.
const LISTED: usize = 10;

fn name(path: &Path) -> String {
    path.file_name()
        .unwrap_or(path.as_os_str())
        .to_string_lossy()
        .into_owned()
}

fn count(problems: usize) -> String {
    if problems == 1 {
        "1 problem".to_owned()
    } else {
        format!("{problems} problems")
    }
}

/// The first few problems, a line each, and how many more there are.
fn list(problems: &[String]) -> String {
    let mut text: String = problems
        .iter()
        .take(LISTED)
        .map(|p| format!("\n  {p}"))
        .collect();
    if problems.len() > LISTED {
        text.push_str(&format!("\n  and {} more", problems.len() - LISTED));
    }
    text
}
