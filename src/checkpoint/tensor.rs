//! One tensor: its bytes as they are on disk, and what they mean.
//!
//! It does no arithmetic; [`TensorData::first_non_finite`] only looks.

use std::path::PathBuf;

use bytes::Bytes;
use half::{bf16, f16};

use crate::config::Dtype;

/// How a tensor's numbers are kept. Little-endian, row by row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum Format {
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
}

impl Format {
    /// Bytes of one element; also the alignment that a tensor's bytes are promised to have.
    pub const fn size(self) -> usize {
        self.dtype().size()
    }

    /// The dtype of the elements.
    pub const fn dtype(self) -> Dtype {
        match self {
            Format::Bf16 => Dtype::Bf16,
            Format::F16 => Dtype::F16,
            Format::F32 => Dtype::F32,
        }
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Format::Bf16 => "BF16",
            Format::F16 => "F16",
            Format::F32 => "F32",
        })
    }
}

/// A tensor of a checkpoint. Cloning it copies no weights.
#[derive(Debug, Clone)]
pub struct TensorData {
    /// The published name.
    pub name: String,
    /// How the numbers are kept.
    pub format: Format,
    /// The shape as in [`crate::config::TensorSpec::shape`]: `[heads]` for `A_log`, `[channels, taps]` for convolutions.
    pub shape: Vec<usize>,
    /// The numbers, as mapped from the file: `elements() * format.size()` bytes, aligned to `format.size()`.
    pub bytes: Bytes,
    /// The file they are in.
    pub file: PathBuf,
}

impl TensorData {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.bytes.len() / self.format.size()
    }

    /// The first number that is not finite, with its flat index.
    pub fn first_non_finite(&self) -> Option<(usize, f32)> {
        let of = |size: usize, read: fn(&[u8]) -> f32| {
            self.bytes
                .chunks_exact(size)
                .map(read)
                .enumerate()
                .find(|(_, x)| !x.is_finite())
        };
        match self.format {
            Format::Bf16 => of(2, |b| bf16::from_le_bytes([b[0], b[1]]).to_f32()),
            Format::F16 => of(2, |b| f16::from_le_bytes([b[0], b[1]]).to_f32()),
            Format::F32 => of(4, |b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
        }
    }
}
