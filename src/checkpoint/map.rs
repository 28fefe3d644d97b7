//! Mapping a file into memory, or in a browser reading its ranges: the one file of this module with `unsafe`.

#![allow(unsafe_code)]

use std::ops::Range;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::Shard;
use crate::error::CheckpointError;

/// Opens a file of weights, which is mapped.
#[cfg(not(target_arch = "wasm32"))]
pub(super) fn open(path: PathBuf) -> Result<Shard, CheckpointError> {
    let bytes = map(&path)?;
    Ok(Shard {
        length: bytes.len(),
        path,
        bytes,
        derived: false,
    })
}

/// Opens a file of the page, whose ranges are read when they are needed.
#[cfg(target_arch = "wasm32")]
pub(super) fn open(path: PathBuf) -> Result<Shard, CheckpointError> {
    let length = crate::files::length(&path).map_err(|source| CheckpointError::Read {
        file: path.clone(),
        source,
    })?;
    Ok(Shard {
        path,
        length,
        bytes: Bytes::new(),
        derived: false,
    })
}

/// A byte range of a shard.
#[cfg(not(target_arch = "wasm32"))]
pub(super) fn slice(shard: &Shard, range: Range<usize>) -> Result<Bytes, CheckpointError> {
    Ok(shard.bytes.slice(range))
}

/// A byte range of a shard, if it is in memory.
#[cfg(target_arch = "wasm32")]
pub(super) fn slice(shard: &Shard, range: Range<usize>) -> Result<Bytes, CheckpointError> {
    if shard.derived {
        return Ok(shard.bytes.slice(range));
    }
    crate::files::range(&shard.path, range).map_err(|source| CheckpointError::Read {
        file: shard.path.clone(),
        source,
    })
}

/// A byte range of a shard, mapped for as long as it lives: its pages are released with it, while pages of the shard's own
/// mapping count as memory of the process until that ends.
#[cfg(not(target_arch = "wasm32"))]
pub(super) fn window(shard: &Shard, range: Range<usize>) -> Result<Bytes, CheckpointError> {
    let read = |source| CheckpointError::Read {
        file: shard.path.clone(),
        source,
    };
    let file = std::fs::File::open(&shard.path).map_err(read)?;
    let length = file.metadata().map_err(read)?.len();
    if length != shard.length as u64 {
        return Err(CheckpointError::Length {
            file: shard.path.clone(),
            expected: shard.length as u64,
            found: length,
        });
    }
    if range.is_empty() {
        return Ok(Bytes::new());
    }
    mapped(&file, range).map_err(read)
}

/// A page has no mappings.
#[cfg(target_arch = "wasm32")]
pub(super) fn window(shard: &Shard, range: Range<usize>) -> Result<Bytes, CheckpointError> {
    slice(shard, range)
}

/// A file of the page.
#[cfg(target_arch = "wasm32")]
pub(super) fn map(path: &Path) -> Result<Bytes, CheckpointError> {
    let shard = open(path.to_owned())?;
    slice(&shard, 0..shard.length)
}

/// The file's bytes, mapped read-only. They live as long as the last slice of them. An empty file gives no bytes.
#[cfg(not(target_arch = "wasm32"))]
pub(super) fn map(path: &Path) -> Result<Bytes, CheckpointError> {
    let read = |source| CheckpointError::Read {
        file: path.to_owned(),
        source,
    };
    let file = std::fs::File::open(path).map_err(read)?;
    let length = file.metadata().map_err(read)?.len();
    let length =
        usize::try_from(length).map_err(|_| read(std::io::ErrorKind::FileTooLarge.into()))?;
    if length == 0 {
        return Ok(Bytes::new());
    }
    mapped(&file, 0..length).map_err(read)
}

/// Maps a file that is not empty.
#[cfg(not(target_arch = "wasm32"))]
fn mapped(file: &std::fs::File, range: Range<usize>) -> std::io::Result<Bytes> {
    let mut options = memmap2::MmapOptions::new();
    options.offset(range.start as u64).len(range.len());
    // SAFETY: the mapping is read-only and private to this process, and `Bytes` keeps it alive for as long as any slice of
    // it. That no other process shortens or rewrites the file meanwhile cannot be enforced here: the documentation requires
    // that a checkpoint in use is not modified. Every bit pattern is a valid u8.
    let mapping = unsafe { options.map(file) }?;
    Ok(Bytes::from_owner(mapping))
}
