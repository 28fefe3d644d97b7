//! The scales of a quantised matrix, and the elements that each applies to.

use half::{bf16, f16};
use safetensors::Dtype;

use super::super::blocks::E4M3;

/// How a scale is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Number {
    Bf16,
    F16,
    F32,
    /// A power of two: `2^(e - 127)`; 255 is NaN.
    E8m0,
    E4m3,
}

impl Number {
    /// The format of scales of this dtype; U8 may be either of two formats, which the caller knows.
    pub(super) fn of(dtype: Dtype, byte: Option<Number>) -> Option<Self> {
        match dtype {
            Dtype::BF16 => Some(Self::Bf16),
            Dtype::F16 => Some(Self::F16),
            Dtype::F32 => Some(Self::F32),
            Dtype::F8_E8M0 => Some(Self::E8m0),
            Dtype::F8_E4M3 => Some(Self::E4m3),
            Dtype::U8 => byte,
            _ => None,
        }
    }

    /// The scales, widened exactly.
    pub(super) fn widen(self, bytes: &[u8]) -> Vec<f32> {
        let pairs = || bytes.as_chunks::<2>().0.iter();
        match self {
            Self::Bf16 => pairs().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
            Self::F16 => pairs().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
            Self::F32 => {
                let fours = bytes.as_chunks::<4>().0.iter();
                fours.map(|b| f32::from_le_bytes(*b)).collect()
            }
            Self::E8m0 => bytes.iter().map(|e| power(*e)).collect(),
            Self::E4m3 => bytes.iter().map(|b| E4M3[usize::from(*b)]).collect(),
        }
    }
}

/// `2^(e - 127)`.
fn power(e: u8) -> f32 {
    match e {
        0 => f32::from_bits(0x0040_0000),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(e) << 23),
    }
}

/// One scale for each `rows` x `columns` elements of a matrix; at the right and lower edge for fewer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct Grid {
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// Number of scales in a row of the grid.
    pub(super) across: usize,
}

impl Grid {
    /// Interprets the shape of the scales of a `[rows, columns]` matrix: one for the whole matrix, one per row, one for each
    /// group of a row's columns, or one for each block of size `block`.
    pub(super) fn of(
        shape: &[usize],
        [rows, columns]: [usize; 2],
        block: [usize; 2],
    ) -> Option<Self> {
        let grid = |rows, columns, across| {
            Some(Self {
                rows,
                columns,
                across,
            })
        };
        match *shape {
            [] | [1] => grid(rows, columns, 1),
            [r] if r == rows => grid(1, columns, 1),
            [r, across] if r == rows && across > 0 && columns.is_multiple_of(across) => {
                grid(1, columns / across, across)
            }
            [r, across]
                if block.iter().all(|size| *size > 0)
                    && r == rows.div_ceil(block[0])
                    && across == columns.div_ceil(block[1]) =>
            {
                grid(block[0], block[1], across)
            }
            [1, 1] => grid(rows, columns, 1),
            _ => None,
        }
    }

    /// The index of the scale of an element.
    pub(super) fn at(self, row: usize, column: usize) -> usize {
        row / self.rows * self.across + column / self.columns
    }

    /// Whether each run of this many columns has a single scale.
    pub(super) fn covers(self, run: usize, columns: usize) -> bool {
        self.columns >= columns || self.columns.is_multiple_of(run)
    }
}
