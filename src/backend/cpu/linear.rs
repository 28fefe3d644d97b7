//! `output = input weight^T`, with the weight widened a few rows at a time.
//!
//! Weights and inputs are both contiguous along the summed dimension, so a tile of dot products needs no packing. Each
//! dot product has one order of summation, so a row's result does not depend on how many rows there are.

use rayon::prelude::*;

use super::math::products;
use super::memory::CpuWeight;

/// Weight rows widened together: few enough for their f32 copies to stay in a core's own cache.
const TILE: usize = 16;

/// `output[r] = input[r] W^T` with W the `outputs` weight rows from `first_row` on: `[r, columns] -> [r, outputs]`.
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
    output
        .par_chunks_exact_mut(outputs)
        .enumerate()
        .for_each(|(r, row)| {
            row.iter_mut()
                .zip(columns.chunks_exact(count))
                .for_each(|(value, column)| *value = column[r]);
        });
}

/// The same with the output laid out `[outputs, r]`.
fn transposed(input: &[f32], weight: &CpuWeight, first_row: usize, output: &mut [f32]) {
    let width = weight.columns();
    let count = input.len() / width;
    if count == 0 {
        return;
    }
    output
        .par_chunks_mut(TILE * count)
        .enumerate()
        .for_each_init(
            || vec![0.0; TILE * width],
            |rows, (tile, output)| {
                let rows = &mut rows[..output.len() / count * width];
                for (i, row) in rows.chunks_exact_mut(width).enumerate() {
                    weight.row(first_row + tile * TILE + i, row);
                }
                products(width, input, rows, output);
            },
        );
}
