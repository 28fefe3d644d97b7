//! How a weight's numbers are kept: plain elements, or blocks of elements that share what scales them.
//!
//! Everything that has to do with the size of a stored row is here. A format of blocks is added in `blocks`, and, where
//! shaders and kernels know it, in [`FORMATS`].

use std::ops::Range;

use super::{BlockFormat, blocks, ggml::TYPES};
use crate::config::Dtype;

/// How numbers are kept, row by row, little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Format {
    /// Each element by itself.
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

    /// Its number in shaders and kernels; `None` where they do not know it.
    pub fn id(self) -> Option<u32> {
        let found = FORMATS.iter().position(|format| *format == self)?;
        u32::try_from(found).ok()
    }

    /// Elements of a block; 1 where each stands by itself.
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

    /// The alignment that stored bytes are promised to have.
    pub const fn alignment(self) -> usize {
        match self {
            Self::Dense(dtype) => dtype.size(),
            Self::Block(_) => 1,
        }
    }

    /// Bytes of `rows` rows of `columns` elements; `None` where a row is not whole blocks, or the number does not fit.
    pub fn bytes(self, rows: usize, columns: usize) -> Option<usize> {
        let row = self.split_columns(0..columns)?.end;
        rows.checked_mul(row)
    }

    /// Where rows `rows` of `columns` elements lie in stored bytes; `None` as for [`Format::bytes`].
    pub fn split_rows(self, rows: Range<usize>, columns: usize) -> Option<Range<usize>> {
        Some(self.bytes(rows.start, columns)?..self.bytes(rows.end, columns)?)
    }

    /// Where columns `columns` lie in a stored row; `None` where a border is inside a block.
    pub fn split_columns(self, columns: Range<usize>) -> Option<Range<usize>> {
        let at = |column: usize| {
            let blocks = column / self.block();
            let whole = column.is_multiple_of(self.block());
            whole.then(|| blocks.checked_mul(self.block_bytes()))?
        };
        Some(at(columns.start)?..at(columns.end)?)
    }

    /// Elements in so many bytes.
    pub const fn elements(self, bytes: usize) -> usize {
        bytes / self.block_bytes() * self.block()
    }

    /// Widens whole blocks to f32; exact where each element stands by itself.
    #[inline(always)]
    pub fn widen(self, bytes: &[u8], values: &mut [f32]) {
        match self {
            Self::Dense(dtype) => dtype.widen_into(bytes, values),
            Self::Block(format) => format.widen(bytes, values),
        }
    }

    /// Values as they are kept, rounded to nearest even; `None` for blocks, whose making is a quantiser's.
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
