//! Rows of activations, quantised to eight bits.

use bytemuck::Zeroable;
use rayon::prelude::*;

use super::super::math::vectorised;
use super::{BLOCK, BLOCKS, GROUP, SUPERBLOCK};

/// Below this, the factor that computes codes is not finite: a block whose greatest magnitude is smaller is rounded to zero.
const SMALLEST: f32 = 1e-36;

/// Rows in blocks of 32 columns: a code is `x * (127 / max |x|)`, rounded to nearest even. The code's value is `scale * code`
/// with `scale = max |x| / 127`, each operation rounded in f32. A block with a number that is not finite has the scale NaN,
/// which makes every product with it NaN.
pub(in super::super) struct Activations {
    count: usize,
    /// `[count, superblocks]`, each row padded with zeros.
    superblocks: Vec<Superblock>,
}

/// 256 columns of a row.
#[derive(Clone, Copy, bytemuck::Zeroable)]
pub(super) struct Superblock {
    pub(super) codes: [[i8; BLOCK]; BLOCKS],
    /// Per block.
    pub(super) scales: [f32; BLOCKS],
    /// Sums of codes over the columns that share a scale of the weights.
    pub(super) totals: Groups<i32>,
    /// These sums times the scale: the factors of minimums.
    pub(super) sums: Groups<f32>,
}

/// A number per group of columns, in the order of the lanes.
#[derive(Clone, Copy, bytemuck::Zeroable)]
pub(super) struct Groups<T> {
    /// Groups of 32: one per block.
    pub(super) blocks: [T; BLOCKS],
    /// Groups of 16: half h of block b is `halves[b / 4][b % 4 + 4 h]`.
    pub(super) halves: [[T; 8]; 2],
}

impl<T> Groups<T> {
    /// The numbers of the lanes in each step of a superblock; a group is half a block or a block.
    #[inline(always)]
    pub(super) fn steps(&self, halves: bool) -> &[[T; 8]] {
        if halves {
            &self.halves
        } else {
            std::slice::from_ref(&self.blocks)
        }
    }
}

impl Activations {
    /// `input` `[count, width]`, at least one row of a multiple of 32 columns.
    pub(in super::super) fn new(input: &[f32], width: usize) -> Self {
        let (count, superblocks) = (input.len() / width, width.div_ceil(SUPERBLOCK));
        let mut rows = Self {
            count,
            superblocks: vec![Superblock::zeroed(); count * superblocks],
        };
        rows.superblocks
            .par_chunks_exact_mut(superblocks)
            .zip(input.par_chunks_exact(width))
            .for_each(|(row, input)| {
                vectorised(
                    #[inline(always)]
                    || {
                        for (to, input) in row.iter_mut().zip(input.chunks(SUPERBLOCK)) {
                            let blocks = input.as_chunks::<BLOCK>().0.iter();
                            blocks.enumerate().for_each(|(b, x)| to.quantise(b, x));
                        }
                    },
                );
            });
        rows
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Superblocks per row.
    pub(super) fn superblocks(&self) -> usize {
        self.superblocks.len() / self.count
    }

    /// `[superblocks]` of row `r`.
    #[inline(always)]
    pub(super) fn row(&self, r: usize) -> &[Superblock] {
        let superblocks = self.superblocks();
        &self.superblocks[r * superblocks..][..superblocks]
    }
}

impl Superblock {
    /// Writes block `b`, which contained zeros.
    #[inline(always)]
    fn quantise(&mut self, b: usize, input: &[f32; BLOCK]) {
        // Adding 1.5 * 2^23 rounds to an integer, to nearest even, and leaves it in the low bits.
        const ROUND: f32 = 12_582_912.0;
        let (mut greatest, mut zero) = ([0.0_f32; 8], [0.0_f32; 8]);
        for input in input.as_chunks::<8>().0 {
            for lane in 0..8 {
                let magnitude = input[lane].abs();
                greatest[lane] = if magnitude > greatest[lane] {
                    magnitude
                } else {
                    greatest[lane]
                };
                // NaN for numbers that are not finite, which comparisons ignore.
                zero[lane] += input[lane] * 0.0;
            }
        }
        let greatest = greatest.into_iter().fold(0.0, f32::max);
        let finite = !zero.into_iter().sum::<f32>().is_nan();
        if finite && greatest < SMALLEST {
            return;
        }
        let scale = if finite { greatest / 127.0 } else { f32::NAN };
        if finite {
            let inverse = 127.0 / greatest;
            for (code, x) in self.codes[b].iter_mut().zip(input) {
                *code = (x * inverse + ROUND).to_bits() as i8;
            }
        }
        self.scales[b] = scale;
        let halves = self.codes[b].as_chunks::<GROUP>().0.iter();
        let mut total = 0;
        for (h, codes) in halves.enumerate() {
            let half: i32 = codes.iter().map(|code| i32::from(*code)).sum();
            let (step, lane) = (b / 4, b % 4 + 4 * h);
            self.totals.halves[step][lane] = half;
            self.sums.halves[step][lane] = scale * half as f32;
            total += half;
        }
        self.totals.blocks[b] = total;
        self.sums.blocks[b] = scale * total as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one_block(values: [f32; BLOCK]) -> ([i8; BLOCK], f32, [f32; 2]) {
        let rows = Activations::new(&values, BLOCK);
        let first = &rows.row(0)[0];
        let sums = first.sums.halves[0];
        (first.codes[0], first.scales[0], [sums[0], sums[4]])
    }

    #[test]
    fn codes_are_rounded_to_nearest_even() {
        let mut values = [0.0; BLOCK];
        // The quantisation step is 1, because 127 is the greatest magnitude.
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
    fn sums_are_of_the_groups_that_lanes_have() {
        // The quantisation step of every block is 1.
        let value = |i: usize| if i % 32 == 5 { 127.0 } else { (i / 16) as f32 };
        let input: Vec<f32> = (0..288).map(value).collect();
        let rows = Activations::new(&input, 288);
        assert_eq!(rows.superblocks(), 2);
        for b in 0..9 {
            let row = &rows.row(0)[b / 8];
            let halves = [0, 1].map(|h| 16 * (2 * b + h) as i32);
            let halves = [halves[0] - 2 * b as i32 + 127, halves[1]];
            for (h, half) in halves.into_iter().enumerate() {
                let (step, lane) = (b % 8 / 4, b % 4 + 4 * h);
                assert_eq!(row.totals.halves[step][lane], half, "{b}, {h}");
                assert_eq!(row.sums.halves[step][lane], half as f32, "{b}, {h}");
            }
            let total = halves[0] + halves[1];
            assert_eq!(row.totals.blocks[b % 8], total, "{b}");
            assert_eq!(row.sums.blocks[b % 8], total as f32, "{b}");
        }
        let filled = &rows.row(0)[1];
        assert_eq!(filled.codes[1..], [[0; BLOCK]; 7]);
        assert_eq!(
            (&filled.scales[1..], &filled.sums.blocks[1..]),
            (&[0.0; 7][..], &[0.0; 7][..])
        );
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
