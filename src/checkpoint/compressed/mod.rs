//! Quantised weights in safetensors files of compressed-tensors, DeepSeek, ModelOpt and MLX: their storage, and the blocks
//! that they are loaded as.
//!
//! The scheme of a weight is recognised from names, dtypes and shapes ([`recognise`]), and checked against the configuration.
//! A weight is repacked each time that it is requested ([`repack`]): into blocks whose values are those of the scheme's
//! formula in f32, to the bit. [`Scheme`] has the formulas.

mod expand;
mod grid;
mod recognise;
mod repack;

use std::ops::Range;

pub(super) use recognise::{Taken, take};

use bytes::Bytes;

use self::expand::Expand;
use self::grid::{Grid, Number};
use super::blocks::{
    FP4, FP4_128, FP8, FP8_64, FP8_128, INT4, INT4_64, INT4_128, INT4_BF16, INT6, INT6_64, INT8,
    INT8_64, INT8_128, MXFP4, Q4_0, Q4_1, Q4_1_64, Q5_1, Q8_0,
};
use super::encoded::Encoded;
use super::{BlockFormat, Format, Shard};
use crate::error::CheckpointError;

/// A weight that is computed when it is requested.
#[derive(Clone, Debug)]
pub(super) enum Repacked {
    /// One quantised matrix.
    Matrix(Packed),
    /// `kv_b_proj` in two parts.
    Expand(Expand),
    /// A matrix that is quantised.
    Encoded(Encoded),
}

impl Repacked {
    /// The format that it is repacked to, unless a scale does not fit that format.
    fn format(&self) -> Format {
        match self {
            Self::Matrix(packed) => Format::Block(packed.usual()),
            Self::Expand(_) => Format::F32,
            Self::Encoded(encoded) => encoded.format(),
        }
    }

    /// Computes the weight.
    ///
    /// # Errors
    /// [`CheckpointError::Read`] or [`CheckpointError::Length`] if a shard cannot be read any more.
    pub(super) fn make(&self, shards: &[Shard]) -> Result<(Format, Bytes), CheckpointError> {
        match self {
            Self::Matrix(packed) => packed.repack(shards),
            Self::Expand(expand) => expand.matrix(shards),
            Self::Encoded(encoded) => encoded.make(shards),
        }
    }

    /// Codes and scales as byte ranges of shards; codes first.
    pub(super) fn stored(&self) -> Vec<(usize, Range<usize>)> {
        let parts: Vec<&Stored> = match self {
            Self::Matrix(packed) => vec![&packed.codes, &packed.scales.stored],
            Self::Expand(expand) => expand.stored().collect(),
            Self::Encoded(encoded) => return encoded.stored(),
        };
        parts
            .into_iter()
            .map(|part| (part.shard, part.range.clone()))
            .collect()
    }
}

/// Bytes that are aligned as f32.
struct Words(Vec<f32>);

impl AsRef<[u8]> for Words {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

/// A copy of these bytes, aligned for every dtype.
pub(super) fn copied(bytes: &[u8]) -> Bytes {
    let mut words = vec![0.0_f32; bytes.len().div_ceil(4)];
    bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(bytes);
    Bytes::from_owner(Words(words)).slice(..bytes.len())
}

/// Bytes of a shard.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    shard: usize,
    range: Range<usize>,
}

/// Scales or zero points of a matrix, each of which applies to a part of it.
#[derive(Clone, Debug)]
struct Scales {
    stored: Stored,
    number: Number,
    grid: Grid,
}

/// A quantised matrix as it is stored.
#[derive(Clone, Debug)]
pub(super) struct Packed {
    rows: usize,
    columns: usize,
    /// `[rows, row_bytes]`: the codes of a row are a little-endian bit string.
    codes: Stored,
    row_bytes: usize,
    /// Bits of a code.
    bits: usize,
    scales: Scales,
    scheme: Scheme,
}

/// The value of an element with code `q` and scale `s`, each operation rounded in f32.
#[derive(Clone, Debug)]
enum Scheme {
    /// `(q - z) * s`. Codes are stored as `q + 2^(bits - 1)`, or as they are in I8.
    Integer { signed: bool, zeros: Option<Zeros> },
    /// `q * s + b` with unsigned `q`; `biases` have the layout of the scales.
    Affine { biases: Scales },
    /// `e4m3(q) * s`.
    Float8,
    /// `e2m1(q) * s`.
    Float4,
    /// `e2m1(q) * (s / global)`, or `e2m1(q) * (s * global)`.
    Float4Global { global: Stored, divides: bool },
}

/// The zero points of a matrix, in the grid of its scales.
#[derive(Clone, Debug)]
enum Zeros {
    /// Packed in I32 along the rows: that of row r at bit `r * bits`, encoded like the codes.
    Packed(Stored),
    /// In I8.
    Signed(Stored),
}

impl Packed {
    /// The format that it is repacked to, unless a scale does not fit that format.
    fn usual(&self) -> &'static BlockFormat {
        // Scales in F32 do not fit f16.
        let halves = self.scales.number != Number::F32;
        match (&self.scheme, self.bits) {
            (Scheme::Integer { zeros: None, .. }, 4) if halves => &Q4_0,
            (Scheme::Integer { zeros: None, .. }, 8) if halves => &Q8_0,
            (Scheme::Integer { .. }, 4) => self.int4(self.scales.number == Number::Bf16),
            (Scheme::Affine { .. }, 0..=4) if halves => self.longest(&[&Q4_1_64]).unwrap_or(&Q4_1),
            (Scheme::Affine { .. }, 5) if halves => &Q5_1,
            (Scheme::Affine { .. }, 6) if halves => self.longest(&[&INT6_64]).unwrap_or(&INT6),
            (Scheme::Integer { .. } | Scheme::Affine { .. }, _) => self.int8(),
            (Scheme::Float8, _) => self.longest(&[&FP8_128, &FP8_64]).unwrap_or(&FP8),
            (Scheme::Float4, _) if self.scales.number == Number::E8m0 => &MXFP4,
            (Scheme::Float4 | Scheme::Float4Global { .. }, _) => self.fp4(),
        }
    }

    /// Four bits with zero points, or with scales that f16 does not hold; `brief` for scales that bf16 holds.
    fn int4(&self, brief: bool) -> &'static BlockFormat {
        let short = if brief { &INT4_BF16 } else { &INT4 };
        self.longest(&[&INT4_128, &INT4_64]).unwrap_or(short)
    }

    fn int8(&self) -> &'static BlockFormat {
        self.longest(&[&INT8_128, &INT8_64]).unwrap_or(&INT8)
    }

    /// Four-bit floats with a scale for every 16 columns.
    fn fp4(&self) -> &'static BlockFormat {
        match self.columns.is_multiple_of(FP4_128.length) {
            true => &FP4_128,
            false => &FP4,
        }
    }

    /// The first of these formats whose blocks divide the rows, with a single scale in each block.
    fn longest(&self, formats: &[&'static BlockFormat]) -> Option<&'static BlockFormat> {
        let fits = |format: &&&BlockFormat| {
            let length = format.length;
            self.columns.is_multiple_of(length) && self.scales.grid.covers(length, self.columns)
        };
        formats.iter().find(fits).copied()
    }
}
