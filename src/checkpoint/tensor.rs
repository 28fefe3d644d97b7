//! One tensor: its bytes as they are on disk, and what they mean.
//!
//! It does no arithmetic; [`TensorData::first_non_finite`] only looks.

use std::path::PathBuf;

use bytes::Bytes;

use super::Format;

/// A tensor of a checkpoint. Cloning it copies no weights.
#[derive(Debug, Clone)]
pub struct TensorData {
    /// The published name.
    pub name: String,
    /// How the numbers are kept.
    pub format: Format,
    /// The shape as in [`crate::config::TensorSpec::shape`]: `[heads]` for `A_log`, `[channels, taps]` for convolutions.
    pub shape: Vec<usize>,
    /// The numbers, as mapped from the file, aligned as [`Format::alignment`] says.
    pub bytes: Bytes,
    /// The file they are in.
    pub file: PathBuf,
}

impl TensorData {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.format.elements(self.bytes.len())
    }

    /// The first number that is not finite, with its flat index.
    pub fn first_non_finite(&self) -> Option<(usize, f32)> {
        const BLOCKS: usize = 4096;
        let (block, bytes) = (self.format.block(), self.format.block_bytes());
        let mut values = Vec::new();
        let mut runs = self.bytes.chunks(BLOCKS * bytes).enumerate();
        runs.find_map(|(i, bytes)| {
            values.resize(self.format.elements(bytes.len()), 0.0);
            self.format.widen(bytes, &mut values);
            let found = values.iter().position(|x| !x.is_finite())?;
            Some((i * BLOCKS * block + found, values[found]))
        })
    }
}
