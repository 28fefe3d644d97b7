//! Mapping a file into memory: the one place of this room where `unsafe` stands.

#![allow(unsafe_code)]

use std::path::Path;

use bytes::Bytes;

use crate::error::CheckpointError;

/// A browser has no files: what the system says of that.
#[cfg(target_arch = "wasm32")]
pub(super) fn map(path: &Path) -> Result<Bytes, CheckpointError> {
    let read = |source| CheckpointError::Read {
        file: path.to_owned(),
        source,
    };
    std::fs::read(path).map(Bytes::from).map_err(read)
}

/// The file's bytes, mapped read-only. They live as long as the last slice of them. An empty file gives no bytes.
#[cfg(not(target_arch = "wasm32"))]
pub(super) fn map(path: &Path) -> Result<Bytes, CheckpointError> {
    let read = |source| CheckpointError::Read {
        file: path.to_owned(),
        source,
    };
    let file = std::fs::File::open(path).map_err(read)?;
    if file.metadata().map_err(read)?.len() == 0 {
        return Ok(Bytes::new());
    }
    // SAFETY: the mapping is read-only and private to this process, and `Bytes` keeps it alive for as long as any slice
    // of it. That nobody shortens or rewrites the file meanwhile cannot be enforced from here: a checkpoint in use must be
    // left alone, as the documentation says. Every bit pattern is a valid u8.
    let mapping = unsafe { memmap2::Mmap::map(&file) }.map_err(read)?;
    Ok(Bytes::from_owner(mapping))
}
