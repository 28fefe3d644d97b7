//! Storage formats of weights: plain elements, or blocks of elements that share scales.
//!
//! All sizes of stored rows are computed here. A block format is added in `blocks` and, if shaders and kernels support it, in
//! [`FORMATS`].

use std::ops::Range;

use super::{BlockFormat, blocks, ggml::TYPES};
use crate::config::Dtype;

/// The format of a weight's elements, stored by rows, little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Format {
    /// Single elements.
    Dense(Dtype),
    /// Blocks of elements.
    Block(&'static BlockFormat),
}

/// The formats that shaders and kernels know, in the order of their numbers there, which they rely on: plain elements, blocks of
/// 32, of 64 and of 256. The CPU backend reads every format.
pub const FORMATS: [Format; 17] = [
    Format::F32,
    Format::BF16,
    Format::F16,
    Format::Block(&blocks::Q8_0),
    Format::Block(&blocks::Q4_0),
    Format::Block(&blocks::Q4_1),
    Format::Block(&blocks::Q5_0),
    Format::Block(&blocks::Q5_1),
    Format::Block(&blocks::IQ4_NL),
    Format::Block(&blocks::MXFP4),
    Format::Block(&blocks::Q4_1_64),
    Format::Block(&blocks::Q2_K),
    Format::Block(&blocks::Q3_K),
    Format::Block(&blocks::Q4_K),
    Format::Block(&blocks::Q5_K),
    Format::Block(&blocks::Q6_K),
    Format::Block(&blocks::IQ4_XS),
];

impl Format {
    /// IEEE single precision.
    pub const F32: Self = Self::Dense(Dtype::F32);
    /// bfloat16.
    pub const BF16: Self = Self::Dense(Dtype::Bf16);
    /// IEEE half precision.
    pub const F16: Self = Self::Dense(Dtype::F16);

    /// Its number in shaders and kernels; `None` if they do not support it.
    pub fn id(self) -> Option<u32> {
        let found = FORMATS.iter().position(|format| *format == self)?;
        u32::try_from(found).ok()
    }

    /// Number of elements in a block; 1 for plain elements.
    pub const fn block(self) -> usize {
        match self {
            Self::Dense(_) => 1,
            Self::Block(format) => format.length,
        }
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::Dense(dtype) => dtype.size(),
            Self::Block(format) => format.bytes,
        }
    }

    /// The guaranteed alignment of stored bytes.
    pub const fn alignment(self) -> usize {
        match self {
            Self::Dense(dtype) => dtype.size(),
            Self::Block(_) => 1,
        }
    }

    /// Size of `rows` rows of `columns` elements in bytes; `None` if a row is not a whole number of blocks, or on overflow.
    pub fn bytes(self, rows: usize, columns: usize) -> Option<usize> {
        let row = self.split_columns(0..columns)?.end;
        rows.checked_mul(row)
    }

    /// The byte range of rows `rows` of `columns` elements; `None` as for [`Format::bytes`].
    pub fn split_rows(self, rows: Range<usize>, columns: usize) -> Option<Range<usize>> {
        Some(self.bytes(rows.start, columns)?..self.bytes(rows.end, columns)?)
    }

    /// The byte range of columns `columns` in a stored row; `None` if a boundary is inside a block.
    pub fn split_columns(self, columns: Range<usize>) -> Option<Range<usize>> {
        let at = |column: usize| {
            let blocks = column / self.block();
            let whole = column.is_multiple_of(self.block());
            whole.then(|| blocks.checked_mul(self.block_bytes()))?
        };
        Some(at(columns.start)?..at(columns.end)?)
    }

    /// Number of elements in this many bytes.
    pub const fn elements(self, bytes: usize) -> usize {
        bytes / self.block_bytes() * self.block()
    }

    /// Widens whole blocks to f32; exact for plain elements.
    #[inline(always)]
    pub fn widen(self, bytes: &[u8], values: &mut [f32]) {
        match self {
            Self::Dense(dtype) => dtype.widen_into(bytes, values),
            Self::Block(format) => format.widen(bytes, values),
        }
    }

    /// Encodes values, rounded to nearest even; `None` for block formats, which only quantisers write.
    pub fn narrow(self, values: &[f32]) -> Option<Vec<u8>> {
        match self {
            Self::Dense(dtype) => Some(dtype.narrow(values)),
            Self::Block(_) => None,
        }
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Dense(Dtype::Bf16) => "BF16",
            Self::Dense(Dtype::F16) => "F16",
            Self::Dense(Dtype::F32) => "F32",
            Self::Block(format) => format.name,
        })
    }
}

impl From<Format> for String {
    fn from(format: Format) -> Self {
        format.to_string()
    }
}

impl TryFrom<String> for Format {
    type Error = String;

    fn try_from(name: String) -> Result<Self, Self::Error> {
        let known = TYPES.iter().filter_map(|known| known.format);
        let known = known.chain(blocks::REPACKED.map(Format::Block));
        let mut known = known.filter(|format| format.to_string() == name);
        let found = known.next();
        found.ok_or_else(|| format!("there is no format of weights called {name}"))
    }
}
