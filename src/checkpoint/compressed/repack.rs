//! Repacks stored codes and scales into blocks, rows in parallel.
//!
//! The stored bytes are mapped only while they are read, so that the file's pages and the blocks are in memory together for
//! one weight at a time.

use bytes::Bytes;
use half::f16;
use rayon::prelude::*;

use super::super::blocks::{
    E4M3, FP4, FP4_128, INT4_BF16, MXFP4, NO_MIN, Q4_0, Q4_1, Q4_1_64, Q5_1, Q8_0,
};
use super::super::{BlockFormat, Format, Shard, map};
use super::grid::Number;
use super::{Packed, Scales, Scheme, Stored, Words, Zeros};
use crate::error::CheckpointError;

/// Number of rows that a thread repacks at a time.
const ROWS: usize = 16;

/// Writes one block of codes, for the given row and first column.
type FillBlock<'a> = dyn Fn([usize; 2], &[i16], &mut [u8]) + Sync + 'a;

/// The scales of a matrix, widened.
struct Numbers {
    scales: Vec<f32>,
    /// Zero points or biases; `None` if the scheme has none.
    zeros: Option<Vec<i32>>,
    biases: Option<Vec<f32>>,
}

impl Packed {
    /// The matrix in blocks, or in F32 if no block holds its numbers exactly.
    ///
    /// # Errors
    /// [`CheckpointError::Read`] if a shard cannot be read any more.
    pub(super) fn repack(&self, shards: &[Shard]) -> Result<(Format, Bytes), CheckpointError> {
        let numbers = self.numbers(shards)?;
        let codes = self.codes.window(shards)?;
        let (scales, grid) = (&numbers.scales, self.scales.grid);
        let scale = |row, column| scales[grid.at(row, column)];
        let offset = self.offset();
        let blocks = |format, block: &FillBlock<'_>| self.blocks(&codes, format, block);
        Ok(match (&numbers.zeros, &numbers.biases, &self.scheme) {
            (None, _, Scheme::Integer { .. }) if self.bits == 4 && halves(scales) => {
                blocks(&Q4_0, &|[row, column], codes, block| {
                    put_half(block, 0, scale(row, column));
                    nibbles(codes, &mut block[2..]);
                })
            }
            (None, _, Scheme::Integer { .. }) if self.bits == 8 && halves(scales) => {
                blocks(&Q8_0, &|[row, column], codes, block| {
                    put_half(block, 0, scale(row, column));
                    bytes_of(codes, offset, &mut block[2..]);
                })
            }
            (zeros, _, Scheme::Integer { .. })
                if self.bits == 4 && zeros.iter().flatten().all(|zero| (-8..8).contains(zero)) =>
            {
                let format = self.int4(scales.iter().all(brief));
                blocks(format, &|[row, column], codes, block| {
                    let zero = zeros
                        .as_ref()
                        .map_or(0, |zeros| zeros[grid.at(row, column)]);
                    let (bits, bytes) = (scale(row, column).to_le_bytes(), codes.len() / 2);
                    // The low half of a scale in bf16 is zero.
                    let kept = if *format == INT4_BF16 {
                        &bits[2..]
                    } else {
                        &bits
                    };
                    let (before, packed) = block.split_at_mut(block.len() - bytes);
                    before[..kept.len()].copy_from_slice(kept);
                    before[kept.len()] = (zero + i32::from(offset)) as u8;
                    nibbles(codes, packed);
                })
            }
            // Products of the zero point are exact, so that the difference of the products is the product of the difference.
            (zeros, _, Scheme::Integer { .. }) if zeros.is_none() || scales.iter().all(short) => {
                blocks(self.int8(), &|[row, column], codes, block| {
                    let (at, scale) = (grid.at(row, column), scale(row, column));
                    let zero = zeros.as_ref().map(|zeros| zeros[at] as f32);
                    put(block, 0, scale);
                    put(block, 4, zero.map_or(NO_MIN, |zero| -zero * scale));
                    bytes_of(codes, offset, &mut block[8..]);
                })
            }
            (_, Some(biases), _) if self.bits < 8 => self.affine(&codes, scales, biases),
            (_, Some(biases), _) if scales.iter().zip(biases).all(centred) => {
                blocks(self.int8(), &|[row, column], codes, block| {
                    let (scale, bias) = (scale(row, column), biases[grid.at(row, column)]);
                    put(block, 0, scale);
                    put(block, 4, bias + 128.0 * scale);
                    bytes_of(codes, 128, &mut block[8..]);
                })
            }
            (_, _, Scheme::Float8) => blocks(self.usual(), &|[row, column], codes, block| {
                put(block, 0, scale(row, column));
                bytes_of(codes, 0, &mut block[4..]);
            }),
            (_, _, Scheme::Float4 | Scheme::Float4Global { .. }) => {
                self.float4(shards, &codes, scales)?
            }
            _ => (Format::F32, self.widen(&codes, &numbers)),
        })
    }

    /// Unsigned codes of less than eight bits with a minimum.
    fn affine(&self, codes: &[u8], scales: &[f32], biases: &[f32]) -> (Format, Bytes) {
        let grid = self.scales.grid;
        let format = if halves(scales) && halves(biases) {
            self.usual()
        } else {
            self.int8()
        };
        self.blocks(codes, format, &|[row, column], codes, block| {
            let (scale, bias) = (scales[grid.at(row, column)], biases[grid.at(row, column)]);
            if format == self.int8() {
                put(block, 0, scale);
                put(block, 4, bias);
                return bytes_of(codes, 0, &mut block[8..]);
            }
            put_half(block, 0, scale);
            put_half(block, 2, bias);
            if *format == Q4_1 || *format == Q4_1_64 {
                nibbles(codes, &mut block[4..]);
            } else if *format == Q5_1 {
                let high = codes.iter().enumerate();
                let high = high.fold(0, |bits, (i, code)| bits | (*code as u32 >> 4 & 1) << i);
                block[4..8].copy_from_slice(&high.to_le_bytes());
                nibbles(codes, &mut block[8..]);
            } else {
                sixes(codes, &mut block[4..]);
            }
        })
    }

    /// Codes of four bits that are floating-point numbers.
    fn float4(
        &self,
        shards: &[Shard],
        codes: &[u8],
        scales: &[f32],
    ) -> Result<(Format, Bytes), CheckpointError> {
        let grid = self.scales.grid;
        let scale = |row, column| scales[grid.at(row, column)];
        if matches!(self.scheme, Scheme::Float4)
            && std::ptr::eq(self.usual(), &MXFP4)
            && finite(scales)
        {
            return Ok(self.blocks(codes, &MXFP4, &|[row, column], codes, block| {
                block[0] = (scale(row, column).to_bits() >> 23) as u8;
                nibbles(codes, &mut block[1..]);
            }));
        }
        if *self.fp4() == FP4_128 && self.scales.number == Number::E4m3 {
            let stored = self.scales.stored.window(shards)?;
            let (whole, divides) = self.whole(shards)?;
            return Ok(
                self.blocks(codes, &FP4_128, &|[row, column], codes, block| {
                    let (first, across) = (grid.at(row, column), codes.len() / 16);
                    put(block, 0, whole);
                    block[4] = u8::from(divides);
                    block[5..13].copy_from_slice(&stored[first..first + across]);
                    nibbles(codes, &mut block[13..]);
                }),
            );
        }
        Ok(self.blocks(codes, &FP4, &|[row, column], codes, block| {
            put(block, 0, scale(row, column));
            put(block, 4, scale(row, column + 16));
            nibbles(codes, &mut block[8..]);
        }))
    }

    /// The offset that is subtracted from stored codes to make them signed.
    fn offset(&self) -> i16 {
        match self.scheme {
            Scheme::Integer { signed: false, .. } => 1 << (self.bits - 1),
            _ => 0,
        }
    }

    /// Repacks rows in parallel; `block` fills the block at a row and a first column.
    fn blocks(
        &self,
        codes: &[u8],
        format: &'static BlockFormat,
        block: &FillBlock<'_>,
    ) -> (Format, Bytes) {
        let row_bytes = self.columns / format.length * format.bytes;
        let mut blocks = vec![0; self.rows * row_bytes];
        let parts = blocks.par_chunks_mut(ROWS * row_bytes).enumerate();
        parts.for_each(|(part, rows)| {
            let mut unpacked = vec![0; self.columns];
            for (row, blocks) in (part * ROWS..).zip(rows.chunks_exact_mut(row_bytes)) {
                self.unpack(codes, row, &mut unpacked);
                let blocks = blocks.chunks_exact_mut(format.bytes);
                let codes = unpacked.chunks_exact(format.length).enumerate();
                for ((i, codes), bytes) in codes.zip(blocks) {
                    block([row, i * format.length], codes, bytes);
                }
            }
        });
        (Format::Block(format), Bytes::from(blocks))
    }

    /// The values by the scheme's formula.
    fn widen(&self, codes: &[u8], numbers: &Numbers) -> Bytes {
        let (grid, offset) = (self.scales.grid, self.offset());
        let mut values = vec![0.0; self.rows * self.columns];
        let rows = values.par_chunks_exact_mut(self.columns).enumerate();
        rows.for_each(|(row, values)| {
            let mut unpacked = vec![0; self.columns];
            self.unpack(codes, row, &mut unpacked);
            for (column, (value, code)) in values.iter_mut().zip(&unpacked).enumerate() {
                let at = grid.at(row, column);
                let scale = numbers.scales[at];
                *value = match (&numbers.zeros, &numbers.biases, &self.scheme) {
                    (_, _, Scheme::Float8) => E4M3[*code as usize & 255] * scale,
                    (_, _, Scheme::Float4 | Scheme::Float4Global { .. }) => {
                        FLOAT4[*code as usize & 15] * scale
                    }
                    (_, Some(biases), _) => f32::from(*code) * scale + biases[at],
                    (zeros, None, _) => {
                        let zero = zeros.as_ref().map_or(0, |zeros| zeros[at]);
                        (i32::from(*code - offset) - zero) as f32 * scale
                    }
                };
            }
        });
        Bytes::from_owner(Words(values))
    }

    /// The codes of a row as they are stored.
    fn unpack(&self, codes: &[u8], row: usize, unpacked: &mut [i16]) {
        let bytes = &codes[row * self.row_bytes..(row + 1) * self.row_bytes];
        match (self.bits, &self.scheme) {
            (8, Scheme::Integer { signed: true, .. }) => {
                for (code, byte) in unpacked.iter_mut().zip(bytes) {
                    *code = i16::from(*byte as i8);
                }
            }
            (8, _) => {
                for (code, byte) in unpacked.iter_mut().zip(bytes) {
                    *code = i16::from(*byte);
                }
            }
            (4, _) => {
                for (codes, byte) in unpacked.as_chunks_mut::<2>().0.iter_mut().zip(bytes) {
                    *codes = [byte & 15, byte >> 4].map(i16::from);
                }
            }
            (bits, _) => {
                let mask = (1 << bits) - 1;
                for (i, code) in unpacked.iter_mut().enumerate() {
                    let at = i * bits;
                    let high = bytes.get(at / 8 + 1).copied().unwrap_or(0);
                    let pair = u16::from_le_bytes([bytes[at / 8], high]);
                    *code = (pair >> (at % 8) & mask) as i16;
                }
            }
        }
    }

    fn numbers(&self, shards: &[Shard]) -> Result<Numbers, CheckpointError> {
        let mut numbers = Numbers {
            scales: self.scales.read(shards)?,
            zeros: None,
            biases: None,
        };
        match &self.scheme {
            Scheme::Integer { zeros, .. } => {
                let zeros = zeros.as_ref().map(|zeros| self.zeros(zeros, shards));
                numbers.zeros = zeros.transpose()?;
            }
            Scheme::Affine { biases } => numbers.biases = Some(biases.read(shards)?),
            Scheme::Float8 | Scheme::Float4 => {}
            Scheme::Float4Global { .. } => {
                let (global, divides) = self.whole(shards)?;
                for scale in &mut numbers.scales {
                    *scale = if divides {
                        *scale / global
                    } else {
                        *scale * global
                    };
                }
            }
        }
        Ok(numbers)
    }

    /// The scale of the whole weight, and whether other scales are divided by it; 1 if there is none.
    fn whole(&self, shards: &[Shard]) -> Result<(f32, bool), CheckpointError> {
        let Scheme::Float4Global { global, divides } = &self.scheme else {
            return Ok((1.0, false));
        };
        let bytes = global.window(shards)?;
        let whole = bytes.first_chunk();
        Ok((whole.map_or(f32::NAN, |b| f32::from_le_bytes(*b)), *divides))
    }

    /// The zero points, as many as there are scales.
    fn zeros(&self, zeros: &Zeros, shards: &[Shard]) -> Result<Vec<i32>, CheckpointError> {
        let across = self.scales.grid.across;
        match zeros {
            Zeros::Signed(stored) => {
                let bytes = stored.window(shards)?;
                Ok(bytes.iter().map(|byte| i32::from(*byte as i8)).collect())
            }
            Zeros::Packed(stored) => {
                let bytes = stored.window(shards)?;
                let words: &[[u8; 4]] = bytes.as_chunks().0;
                let (each, mask) = (32 / self.bits, (1_u32 << self.bits) - 1);
                let zero = |at: usize| {
                    let (row, group) = (at / across, at % across);
                    let word = u32::from_le_bytes(words[row / each * across + group]);
                    (word >> (self.bits * (row % each)) & mask) as i32 - i32::from(self.offset())
                };
                Ok((0..self.rows * across).map(zero).collect())
            }
        }
    }
}

impl Scales {
    fn read(&self, shards: &[Shard]) -> Result<Vec<f32>, CheckpointError> {
        Ok(self.number.widen(&self.stored.window(shards)?))
    }
}

impl Stored {
    /// Maps the bytes for as long as the result lives.
    pub(super) fn window(&self, shards: &[Shard]) -> Result<Bytes, CheckpointError> {
        match shards.get(self.shard) {
            Some(shard) => map::window(shard, self.range.clone()),
            None => Ok(Bytes::new()),
        }
    }
}

/// The floats of four bits (e2m1).
const FLOAT4: [f32; 16] = [
    0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
];

/// Whether f16 holds every number exactly.
fn halves(values: &[f32]) -> bool {
    let exact = |value: &f32| f16::from_f32(*value).to_f32().to_bits() == value.to_bits();
    values.par_iter().all(exact)
}

fn finite(values: &[f32]) -> bool {
    values.iter().all(|value| value.is_finite())
}

/// Whether a number has at most 16 significant bits, so that f32 holds its products with codes of eight bits.
fn short(value: &f32) -> bool {
    value.to_bits() & 0xff == 0
}

/// Whether bf16 holds a number exactly.
fn brief(value: &f32) -> bool {
    value.to_bits() & 0xffff == 0
}

/// Whether `q * scale + bias` is `(q - 128) * scale + (bias + 128 * scale)` to the bit: products and the sum are exact.
fn centred((scale, bias): (&f32, &f32)) -> bool {
    let shift = 128.0 * scale;
    let sum = bias + shift;
    // The error of the sum (Knuth's two-sum).
    let part = sum - bias;
    let error = (bias - (sum - part)) + (shift - part);
    short(scale) && error == 0.0
}

fn put(block: &mut [u8], at: usize, value: f32) {
    block[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn put_half(block: &mut [u8], at: usize, value: f32) {
    block[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
}

/// The low four bits of the first half of each 32 codes below those of the second.
fn nibbles(codes: &[i16], bytes: &mut [u8]) {
    for (codes, bytes) in codes.chunks_exact(32).zip(bytes.chunks_exact_mut(16)) {
        let (low, high) = codes.split_at(16);
        for ((byte, low), high) in bytes.iter_mut().zip(low).zip(high) {
            *byte = (*low & 15) as u8 | ((*high & 15) as u8) << 4;
        }
    }
}

/// The codes less `offset`, a byte each.
fn bytes_of(codes: &[i16], offset: i16, bytes: &mut [u8]) {
    for (byte, code) in bytes.iter_mut().zip(codes) {
        *byte = (code - offset) as u8;
    }
}

/// Four codes of six bits in three bytes.
fn sixes(codes: &[i16], bytes: &mut [u8]) {
    let fours = codes.as_chunks::<4>().0.iter();
    for (codes, bytes) in fours.zip(bytes.as_chunks_mut::<3>().0) {
        let bits = codes
            .iter()
            .rev()
            .fold(0, |bits, code| bits << 6 | *code as u32 & 63);
        let [a, b, c, _] = bits.to_le_bytes();
        *bytes = [a, b, c];
    }
}
