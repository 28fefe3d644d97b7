//! Rows of activations in eight bits.

use rayon::prelude::*;

use super::super::math::vectorised;
use super::{BLOCK, GROUP};

/// Below this, the quotient that makes codes is not finite: a block whose greatest magnitude is smaller counts as zero.
const SMALLEST: f32 = 1e-36;

/// Rows in blocks of 32 columns: a code is `x * (127 / max |x|)`, rounded to nearest even, and stands for `scale * code` with
/// `scale = max |x| / 127`, each operation rounded in f32. A block with a number that is not finite has the scale NaN, which
/// makes every product with it NaN.
pub(in super::super) struct Activations {
    count: usize,
    blocks: usize,
    /// `[count, blocks]`.
    codes: Vec<[i8; BLOCK]>,
    /// `[count, blocks]`.
    scales: Vec<f32>,
    /// `scale * sum of codes` of each 16 columns: `[count, blocks * 2]`, each row padded with zeros to eights.
    sums: Vec<[f32; 8]>,
}

impl Activations {
    /// `input` `[count, width]`, at least one row of a multiple of 32 columns.
    pub(in super::super) fn new(input: &[f32], width: usize) -> Self {
        let (count, blocks) = (input.len() / width, width / BLOCK);
        let eights = (blocks * BLOCK / GROUP).div_ceil(8);
        let mut rows = Self {
            count,
            blocks,
            codes: vec![[0; BLOCK]; count * blocks],
            scales: vec![0.0; count * blocks],
            sums: vec![[0.0; 8]; count * eights],
        };
        let places = rows
            .codes
            .par_chunks_exact_mut(blocks)
            .zip(rows.scales.par_chunks_exact_mut(blocks))
            .zip(rows.sums.par_chunks_exact_mut(eights));
        places
            .zip(input.par_chunks_exact(width))
            .for_each(|(((codes, scales), sums), input)| {
                vectorised(
                    #[inline(always)]
                    || quantise_row(input, codes, scales, sums.as_flattened_mut()),
                );
            });
        rows
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Blocks of a row.
    pub(super) fn blocks(&self) -> usize {
        self.blocks
    }

    /// `[blocks]` of row `r`.
    #[inline(always)]
    pub(super) fn codes(&self, r: usize) -> &[[i8; BLOCK]] {
        &self.codes[r * self.blocks..][..self.blocks]
    }

    /// `[blocks]` of row `r`.
    #[inline(always)]
    pub(super) fn scales(&self, r: usize) -> &[f32] {
        &self.scales[r * self.blocks..][..self.blocks]
    }

    /// What the minimums of row `r` are multiplied with, in eights.
    #[inline(always)]
    pub(super) fn sums(&self, r: usize) -> &[[f32; 8]] {
        let eights = self.sums.len() / self.count;
        &self.sums[r * eights..][..eights]
    }
}

/// One row: `[blocks * 32]` to `[blocks]`, `[blocks]` and `[blocks * 2]`.
#[inline(always)]
fn quantise_row(input: &[f32], codes: &mut [[i8; BLOCK]], scales: &mut [f32], sums: &mut [f32]) {
    // Adding 1.5 * 2^23 rounds to an integer, to nearest even, and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let blocks = input.as_chunks::<BLOCK>().0.iter().zip(codes).zip(scales);
    let sums = sums.as_chunks_mut::<{ BLOCK / GROUP }>().0;
    for (((input, codes), scale), sums) in blocks.zip(sums) {
        let (mut greatest, mut zero) = ([0.0_f32; 8], [0.0_f32; 8]);
        for input in input.as_chunks::<8>().0 {
            for lane in 0..8 {
                let magnitude = input[lane].abs();
                greatest[lane] = if magnitude > greatest[lane] {
                    magnitude
                } else {
                    greatest[lane]
                };
                // NaN for what is not finite, which comparisons pass over.
                zero[lane] += input[lane] * 0.0;
            }
        }
        let greatest = greatest.into_iter().fold(0.0, f32::max);
        if zero.into_iter().sum::<f32>().is_nan() {
            (*scale, *codes, *sums) = (f32::NAN, [0; BLOCK], [f32::NAN; BLOCK / GROUP]);
            continue;
        }
        if greatest < SMALLEST {
            (*scale, *codes, *sums) = (0.0, [0; BLOCK], [0.0; BLOCK / GROUP]);
            continue;
        }
        *scale = greatest / 127.0;
        let inverse = 127.0 / greatest;
        for (code, x) in codes.iter_mut().zip(input) {
            *code = (x * inverse + ROUND).to_bits() as i8;
        }
        for (sum, codes) in sums.iter_mut().zip(codes.as_chunks::<GROUP>().0) {
            let total: i32 = codes.iter().map(|code| i32::from(*code)).sum();
            *sum = *scale * total as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one_block(values: [f32; BLOCK]) -> ([i8; BLOCK], f32, [f32; 2]) {
        let rows = Activations::new(&values, BLOCK);
        let sums = rows.sums(0)[0];
        (rows.codes(0)[0], rows.scales(0)[0], [sums[0], sums[1]])
    }

    #[test]
    fn codes_are_rounded_to_nearest_even() {
        let mut values = [0.0; BLOCK];
        // The step is 1: 127 is the greatest magnitude.
        values[..8].copy_from_slice(&[-127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 0.51, -126.49]);
        values[31] = 3.25;
        let (codes, scale, sums) = one_block(values);
        assert_eq!(codes[..8], [-127, 0, 2, 2, 0, -2, 1, -126]);
        assert_eq!((codes[31], scale), (3, 1.0));
        assert_eq!(sums, [-250.0, 3.0]);
    }

    #[test]
    fn what_cannot_be_scaled_is_zero_or_not_a_number() {
        assert_eq!(one_block([0.0; BLOCK]), ([0; BLOCK], 0.0, [0.0; 2]));
        assert_eq!(one_block([-1e-40; BLOCK]), ([0; BLOCK], 0.0, [0.0; 2]));
        let (codes, scale, _) = one_block([f32::MAX; BLOCK]);
        assert_eq!((codes, scale), ([127; BLOCK], f32::MAX / 127.0));
        for damage in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = [1.0; BLOCK];
            values[17] = damage;
            let (codes, scale, sums) = one_block(values);
            assert_eq!(codes, [0; BLOCK]);
            assert!(scale.is_nan() && sums.iter().all(|sum| sum.is_nan()));
        }
    }

    #[test]
    fn no_code_is_minus_128() {
        for i in 0..2000 {
            let greatest = f32::from_bits(0x3f80_0000 + i * 4099);
            let (codes, ..) = one_block([-greatest; BLOCK]);
            assert_eq!(codes, [-127; BLOCK], "{greatest}");
        }
    }
}
