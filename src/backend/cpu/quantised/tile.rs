//! Products of several rows of activations with decoded weights, eight rows interleaved.
//!
//! Here a lane is a row of the weight; the eight lanes of the definition are eight vectors.

use bytemuck::Zeroable;

use super::super::math::{LINE, prefetch};
use super::activations::{Activations, Superblock};
use super::formats::{Codes, Format, Unpacked, WithFormat, eight};
use super::isa::Isa;
use super::{BLOCK, BLOCKS, fold};

/// Weight rows that are interleaved.
const EIGHT: usize = 8;
/// Weight rows that are decoded together: a few rows of activations in the L1 cache are multiplied with all of them.
pub(super) const ROWS: usize = 2 * EIGHT;
/// Consecutive columns of a weight row: those that one instruction multiplies and sums.
const QUAD: usize = 4;
/// Quads per block.
const QUADS: usize = BLOCK / QUAD;

/// A few weight rows, decoded and interleaved.
#[derive(Default)]
pub(super) struct Packed {
    shape: Shape,
    /// `[eights of rows, superblocks]`.
    superblocks: Vec<EightRows>,
}

/// The properties that [`Format`] gives them.
#[derive(Clone, Copy, Default)]
struct Shape {
    codes: Codes,
    halves: bool,
    mins: bool,
}

/// 256 columns of eight rows.
#[derive(Clone, Copy, bytemuck::Zeroable)]
struct EightRows {
    /// `[block, quad, row, column]`.
    codes: [[[u8; BLOCK]; QUADS]; BLOCKS],
    /// Per group of columns, as in [`super::activations::Groups`]: `[step, lane, row]`.
    scales: [[[f32; EIGHT]; 8]; 2],
    /// The same.
    mins: [[[f32; EIGHT]; 8]; 2],
}

/// Decodes `weights`, at most [`ROWS`] stored rows.
pub(super) struct Pack<'a> {
    pub(super) weights: &'a [&'a [u8]],
    /// Per row.
    pub(super) superblocks: usize,
    pub(super) packed: &'a mut Packed,
}

impl<I: Isa> WithFormat<I> for Pack<'_> {
    fn run<F: Format<BYTES>, const BYTES: usize>(self, isa: I, format: F) {
        let Packed { shape, superblocks } = self.packed;
        *shape = Shape {
            codes: F::CODES,
            halves: F::HALVES,
            mins: F::MINS,
        };
        let eights = self.weights.len().div_ceil(EIGHT);
        superblocks.resize(eights * self.superblocks, EightRows::zeroed());
        isa.run(
            #[inline(always)]
            || {
                let eights = superblocks.chunks_exact_mut(self.superblocks);
                for (eights, rows) in eights.zip(self.weights.chunks(EIGHT)) {
                    for (s, eight) in eights.iter_mut().enumerate() {
                        eight.pack(isa, format, s, rows);
                    }
                }
            },
        );
    }
}

impl EightRows {
    /// Superblock `s` of each of `rows`; missing rows are zeros.
    #[inline(always)]
    fn pack<I: Isa, F: Format<BYTES>, const BYTES: usize>(
        &mut self,
        isa: I,
        format: F,
        s: usize,
        rows: &[&[u8]],
    ) {
        let none = Unpacked::zero(isa);
        let mut unpacked = [none; EIGHT];
        for (unpacked, row) in unpacked.iter_mut().zip(rows) {
            let (whole, rest) = row.as_chunks::<BYTES>();
            let mut last;
            let bytes = if s < whole.len() {
                &whole[s]
            } else {
                last = [0; BYTES];
                last[..rest.len()].copy_from_slice(rest);
                &last
            };
            // Rows are consecutive in memory: the same columns of the next eight.
            let next = bytes.as_ptr().wrapping_add(EIGHT * row.len());
            for at in (0..BYTES).step_by(LINE) {
                prefetch(next.wrapping_add(at));
            }
            *unpacked = format.unpack(isa, bytes);
        }
        for (b, quads) in self.codes.iter_mut().enumerate() {
            let block = eight(
                #[inline(always)]
                |row| unpacked[row].codes[b],
            );
            *quads = bytemuck::cast(isa.transpose(block));
        }
        for step in 0..if F::HALVES { 2 } else { 1 } {
            let scales = eight(
                #[inline(always)]
                |row| bytemuck::cast(unpacked[row].scales[step]),
            );
            self.scales[step] = bytemuck::cast(isa.transpose(scales));
            if F::MINS {
                let mins = eight(
                    #[inline(always)]
                    |row| bytemuck::cast(unpacked[row].mins[step]),
                );
                self.mins[step] = bytemuck::cast(isa.transpose(mins));
            }
        }
    }
}

impl Packed {
    /// `output[c][r] = rows[r] . weights[c]`, for as many weights as `output` `[weights, rows]` has.
    pub(super) fn products<I: Isa>(&self, isa: I, rows: &Activations, output: &mut [f32]) {
        // Number of quads that are summed in 16 bits; 0 for signed codes.
        let sums = match self.shape.codes {
            Codes::Signed => 0,
            Codes::Unsigned { sums, .. } => sums,
        };
        match (self.shape.halves, sums) {
            (false, 0) => self.in_fours::<I, false, 0>(isa, rows, output),
            (false, 8) => self.in_fours::<I, false, 8>(isa, rows, output),
            (false, _) => self.in_fours::<I, false, 4>(isa, rows, output),
            (true, 0) => self.in_fours::<I, true, 0>(isa, rows, output),
            (true, 4 | 8) => self.in_fours::<I, true, 4>(isa, rows, output),
            (true, _) => self.in_fours::<I, true, 2>(isa, rows, output),
        }
    }

    /// The rows, four at a time.
    fn in_fours<I: Isa, const HALVES: bool, const SUMS: usize>(
        &self,
        isa: I,
        rows: &Activations,
        output: &mut [f32],
    ) {
        isa.run(
            #[inline(always)]
            || {
                let whole = rows.count() / 4 * 4;
                for r in (0..whole).step_by(4) {
                    self.rows::<I, HALVES, SUMS, 4>(isa, rows, r, output);
                }
                for r in whole..rows.count() {
                    self.rows::<I, HALVES, SUMS, 1>(isa, rows, r, output);
                }
            },
        );
    }

    /// The products of rows `r .. r + R`.
    #[inline(always)]
    fn rows<I: Isa, const HALVES: bool, const SUMS: usize, const R: usize>(
        &self,
        isa: I,
        rows: &Activations,
        r: usize,
        output: &mut [f32],
    ) {
        let count = rows.count();
        let mut x: [&[Superblock]; R] = [&[]; R];
        for (i, x) in x.iter_mut().enumerate() {
            *x = rows.row(r + i);
        }
        let eights = self.superblocks.chunks_exact(rows.superblocks());
        for (eights, output) in eights.zip(output.chunks_mut(EIGHT * count)) {
            let lanes = tile::<I, HALVES, SUMS, R>(isa, self.shape, eights, x);
            for i in 0..R {
                let products = fold(
                    lanes[i],
                    #[inline(always)]
                    |a, b| isa.add(a, b),
                );
                let products = isa.store(products);
                for (output, product) in output.chunks_exact_mut(count).zip(products) {
                    output[r + i] = product;
                }
            }
        }
    }
}

/// The lanes of `R` rows of activations with eight weight rows: `[R, lane]`, each a vector of eight.
#[inline(always)]
fn tile<I: Isa, const HALVES: bool, const SUMS: usize, const R: usize>(
    isa: I,
    shape: Shape,
    weights: &[EightRows],
    rows: [&[Superblock]; R],
) -> [[I::Lanes; 8]; R] {
    // Groups per block.
    let groups = if HALVES { 2 } else { 1 };
    let mut lanes = [[isa.splat(0.0); 8]; R];
    for (s, eight) in weights.iter().enumerate() {
        for (b, quads) in eight.codes.iter().enumerate() {
            for (h, quads) in quads.chunks_exact(QUADS / groups).enumerate() {
                let [step, lane] = if HALVES {
                    [b / 4, b % 4 + 4 * h]
                } else {
                    [0, b]
                };
                let mut x: [&[[i8; QUAD]]; R] = [&[]; R];
                for r in 0..R {
                    x[r] = &rows[r][s].codes[b].as_chunks().0[h * quads.len()..][..quads.len()];
                }
                let dots = dots::<I, SUMS, R>(isa, quads, x);
                let scales = isa.load(&eight.scales[step][lane]);
                let mins = isa.load(&eight.mins[step][lane]);
                for r in 0..R {
                    let x = &rows[r][s];
                    let total = isa.splat_ints(x.totals.steps(HALVES)[step][lane]);
                    let dot = isa.to_lanes(shape.codes.less_zero(isa, dots[r], total));
                    let scale = isa.mul(scales, isa.splat(x.scales[b]));
                    let mut sum = isa.mul_add(dot, scale, lanes[r][lane]);
                    if shape.mins {
                        let x = isa.splat(x.sums.steps(HALVES)[step][lane]);
                        sum = isa.mul_add(mins, x, sum);
                    }
                    lanes[r][lane] = sum;
                }
            }
        }
    }
    lanes
}

/// The sums of one group's products: lane l of sum r is for activation row r and weight row l.
#[inline(always)]
fn dots<I: Isa, const SUMS: usize, const R: usize>(
    isa: I,
    quads: &[[u8; BLOCK]],
    x: [&[[i8; QUAD]]; R],
) -> [I::Ints; R] {
    let mut dots = [isa.splat_ints(0); R];
    if SUMS == 0 {
        for (k, quad) in quads.iter().enumerate() {
            for r in 0..R {
                let products = isa.signed(isa.bytes(quad), isa.quads(x[r][k]));
                dots[r] = isa.add_ints(dots[r], products);
            }
        }
        return dots;
    }
    for first in (0..quads.len()).step_by(SUMS) {
        let mut partial = [isa.partial(); R];
        for k in first..first + SUMS {
            for r in 0..R {
                let x = isa.quads(x[r][k]);
                partial[r] = isa.unsigned(partial[r], isa.bytes(&quads[k]), x);
            }
        }
        for r in 0..R {
            dots[r] = isa.add_ints(dots[r], isa.total(partial[r]));
        }
    }
    dots
}
