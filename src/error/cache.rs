//! What can be wrong with a snapshot, or with keeping one.

use std::path::PathBuf;

/// What can be wrong with a snapshot, or with keeping one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    /// A file that cannot be read or written.
    #[error("{}: cannot {action} the snapshot", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file that is refused, by name.
    #[error("{}: {source}", path.display())]
    InFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: Box<CacheError>,
    },
    /// Bytes that are no snapshot.
    #[error("not a snapshot: its format should be {expected:?}, but is {found:?}")]
    NotASnapshot {
        /// The format of snapshots.
        expected: String,
        /// The format that is there, or what the bytes begin with.
        found: String,
    },
    /// A snapshot of a format that this build does not read.
    #[error("the snapshot is of format version {found}, but this build reads version {expected}")]
    Version {
        /// The version that is read.
        expected: u32,
        /// The version that is there.
        found: u32,
    },
    /// Bytes that end too soon, or too late.
    #[error(
        "the snapshot is cut off or too long: it should have {expected} bytes, but has {found}"
    )]
    Length {
        /// Bytes that it should have.
        expected: u64,
        /// Bytes that are there.
        found: u64,
    },
    /// A file that is no safetensors file, or cannot become one.
    #[error("the snapshot is no whole safetensors file: {source}")]
    Unreadable {
        /// What is wrong with it.
        source: safetensors::SafeTensorError,
    },
    /// Bytes that are not those that were written.
    #[error("the {record} is damaged: its checksum should be {expected:016x}, but is {found:016x}")]
    Checksum {
        /// Which tensor of which layer.
        record: String,
        /// The checksum that was written.
        expected: u64,
        /// That of the bytes.
        found: u64,
    },
    /// A snapshot of something else: another model, layout or text.
    #[error("the snapshot's {what} should be {expected}, but is {found}")]
    Mismatch {
        /// Which property.
        what: String,
        /// What this model, or the rest of the snapshot, has.
        expected: String,
        /// What the snapshot has.
        found: String,
    },
    /// There is no state for these tokens.
    #[error("no checkpoint is cached within these {tokens} tokens")]
    NothingKept {
        /// Tokens that were asked for.
        tokens: usize,
    },
    /// A snapshot larger than what may be kept.
    #[error("the snapshot needs {needed} bytes of host memory, but only {limit} may be used")]
    HostMemory {
        /// Its bytes.
        needed: u64,
        /// Bytes that may be used.
        limit: u64,
    },
}
