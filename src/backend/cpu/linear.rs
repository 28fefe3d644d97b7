//! `output = input weight^T`, with the weight widened to f32 or decoded to integer codes, a few rows at a time.
//!
//! Weights and inputs are both contiguous along the summed dimension, so a tile of dot products needs no packing. Each dot
//! product has one order of summation, so a row's result does not depend on the number of rows.

use std::ops::Range;

use rayon::prelude::*;

use super::math::{one_row, products};
use super::memory::{CpuWeight, widen};
use super::quantised::{self, Activations};
use crate::backend::weight::StoredRows;
use crate::checkpoint::{BlockFormat, Format};
use crate::config::Dtype;

/// Weight rows that are processed together: few enough for their f32 copies to stay in a core's own cache.
const TILE: usize = 16;

/// `output[r] = input[r] W^T`, where W are `outputs` weight rows from `first_row` on: `[r, columns] -> [r, outputs]`.
pub(super) fn linear(
    input: &[f32],
    weight: &CpuWeight,
    first_row: usize,
    outputs: usize,
    output: &mut [f32],
) {
    let width = weight.columns();
    let count = input.len() / width;
    if count == 1 {
        transposed(input, weight, first_row, output);
        return;
    }
    let mut columns = vec![0.0; count * outputs];
    transposed(input, weight, first_row, &mut columns);
    // Tiles of 16 by 16: a cache line has 16 numbers on both sides.
    const LINE: usize = 16;
    output
        .par_chunks_mut(LINE * outputs)
        .enumerate()
        .for_each(|(i, rows)| {
            for first in (0..outputs).step_by(LINE) {
                let columns = &columns[first * count..];
                for (r, row) in rows.chunks_exact_mut(outputs).enumerate() {
                    let values = row[first..].iter_mut().take(LINE);
                    values
                        .zip(columns.chunks_exact(count))
                        .for_each(|(value, column)| *value = column[LINE * i + r]);
                }
            }
        });
}

/// The same with the output laid out `[outputs, r]`.
fn transposed(input: &[f32], weight: &CpuWeight, first_row: usize, output: &mut [f32]) {
    let width = weight.columns();
    let count = input.len() / width;
    if count == 0 {
        return;
    }
    let outputs = first_row..first_row + output.len() / count;
    let quantised = |part: &StoredRows| in_codes(part.format).is_some();
    let any = weight.parts(outputs).iter().any(quantised);
    let input = Input {
        rows: input,
        activations: any.then(|| Activations::new(input, width)),
    };
    // A single row keeps no widened weights, so it processes more of them in the same time.
    let rows_at_once = if count == 1 { 4 * TILE } else { TILE };
    output
        .par_chunks_mut(rows_at_once * count)
        .enumerate()
        .for_each_init(Scratch::default, |scratch, (tile, output)| {
            let first = first_row + tile * rows_at_once;
            let rows = first..first + output.len() / count;
            input.tile(weight, rows, scratch, output);
        });
}

/// The block format, if products with such weights use integer codes.
fn in_codes(format: Format) -> Option<&'static BlockFormat> {
    match format {
        Format::Block(format) if quantised::applies(format) => Some(format),
        Format::Block(_) | Format::Dense(_) => None,
    }
}

/// Scratch memory that a thread keeps from tile to tile.
#[derive(Default)]
struct Scratch {
    widened: Vec<f32>,
    quantised: quantised::Scratch,
}

/// The rows that weights are multiplied with.
struct Input<'a> {
    /// `[r, columns]`.
    rows: &'a [f32],
    /// The same in eight bits, if any weight is in integer codes.
    activations: Option<Activations>,
}

impl Input<'_> {
    /// `output[c][r] = rows[r] . weight[c]` for the weight rows `tile`: `[tile, r]`.
    fn tile(
        &self,
        weight: &CpuWeight,
        tile: Range<usize>,
        scratch: &mut Scratch,
        mut output: &mut [f32],
    ) {
        let width = weight.columns();
        let count = self.rows.len() / width;
        for part in weight.parts(tile.clone()) {
            let rows = part.rows.start.max(tile.start)..part.rows.end.min(tile.end);
            let (taken, rest) = output.split_at_mut(rows.len() * count);
            output = rest;
            let mut stored = rows.map(|row| part.row(row));
            if let (Some(format), Some(input)) = (in_codes(part.format), &self.activations) {
                quantised::products(format, stored, input, &mut scratch.quantised, taken);
                continue;
            }
            if count == 1 {
                match part.format {
                    Format::Dense(Dtype::Bf16) => {
                        one_row(self.rows, stored, bf16, taken);
                        continue;
                    }
                    Format::Dense(Dtype::F32) => {
                        one_row(self.rows, stored, f32_of, taken);
                        continue;
                    }
                    Format::Dense(Dtype::F16) | Format::Block(_) => {}
                }
            }
            // A single row uses each weight once: widen only a tile of products at a time, so that f32 copies stay in the L1
            // cache.
            let at_once = if count == 1 { 4 } else { TILE };
            scratch.widened.resize(at_once * width, 0.0);
            for output in taken.chunks_mut(at_once * count) {
                let widened = &mut scratch.widened[..output.len() / count * width];
                for (row, bytes) in widened.chunks_exact_mut(width).zip(stored.by_ref()) {
                    widen(part.format, bytes, row);
                }
                products(width, self.rows, widened, output);
            }
        }
    }
}

/// The f32 of four bytes.
#[inline(always)]
fn f32_of(bytes: &[u8; 4]) -> f32 {
    f32::from_le_bytes(*bytes)
}

/// The bf16 of two bytes, widened.
#[inline(always)]
fn bf16(bytes: &[u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16)
}
