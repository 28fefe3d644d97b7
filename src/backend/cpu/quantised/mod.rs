//! Products of weights in integer codes with activations in eight bits.
//!
//! The results are defined once, for every instruction set and for any number of rows. Every 32 activations of a row become
//! codes of eight bits and one scale ([`activations`]); the codes of a weight row have one scale, and in some formats one
//! minimum, per group of 32 or 16 columns ([`formats`]). A row is processed in superblocks of 256 columns, the last one
//! padded with zeros. Eight f32 lanes are summed over the superblocks in order. Groups of 32: the b-th block of 32 columns of
//! a superblock is added to lane b. Groups of 16: its h-th half is added to lane b mod 4 + 4 h, blocks in order. The term
//! that is added is the exact integer sum of the group's products of codes, converted to f32, times the product of the two
//! scales, in one fused multiply-add; then, if the format has minimums, the group's minimum times the scale of the
//! activations times the sum of their codes, in another one. At the end lanes are summed in one order ([`fold`]).
//!
//! One row is multiplied with the stored bytes, whose codes stay in registers ([`row`]); more rows share decoded weights,
//! with eight rows interleaved ([`tile`]).
//!
//! The error is that of the activations, at most half a step, where a step is a 127th of the greatest magnitude of 32
//! activations; [`crate::conformance::EIGHT_BIT_ACTIVATIONS`] bounds the error of a product.

mod activations;
mod formats;
mod isa;
#[cfg(target_arch = "aarch64")]
mod neon;
mod row;
mod scalar;
mod tile;
#[cfg(target_arch = "x86_64")]
mod x86;

use self::formats::Layout;
use self::isa::{Isa, Path, Work};
use crate::checkpoint::{BlockFormat, Unpack};

pub(super) use self::activations::Activations;

/// Columns that share a scale of the activations.
const BLOCK: usize = 32;
/// Minimum number of columns of a weight that share a scale and a minimum.
const GROUP: usize = 16;
/// Blocks per superblock.
const BLOCKS: usize = 8;
/// Columns per superblock.
const SUPERBLOCK: usize = BLOCK * BLOCKS;

/// Whether this module computes products with weights of this format: blocks of integer codes that fit its groups of 32 and
/// 16 columns. Other weights are widened.
pub(super) fn applies(format: &BlockFormat) -> bool {
    let codes = matches!(format.unpack, Unpack::Codes(_));
    codes && format.length.is_multiple_of(BLOCK) && format.group.is_multiple_of(GROUP)
}

/// `output[c][r] = rows[r] . weights[c]`: `weights` are stored rows of `format`, `output` is `[weights, rows]`; `scratch` is
/// memory that calls may share.
pub(super) fn products<'a>(
    format: &'static BlockFormat,
    weights: impl Iterator<Item = &'a [u8]>,
    rows: &Activations,
    scratch: &mut Scratch,
    output: &mut [f32],
) {
    products_in(Path::widest(), format, weights, rows, scratch, output);
}

/// [`products`] with the instruction set `path`.
fn products_in<'a>(
    path: Path,
    format: &'static BlockFormat,
    weights: impl Iterator<Item = &'a [u8]>,
    rows: &Activations,
    scratch: &mut Scratch,
    output: &mut [f32],
) {
    let layout = Layout::of(format);
    let packed = &mut scratch.packed;
    if layout.to_plain() {
        let plain: Vec<Vec<u8>> = weights.map(|bytes| formats::plain(format, bytes)).collect();
        path.run(Products {
            layout,
            weights: plain.iter().map(Vec::as_slice),
            rows,
            packed,
            output,
        });
    } else {
        path.run(Products {
            layout,
            weights,
            rows,
            packed,
            output,
        });
    }
}

/// Scratch memory that a thread keeps from call to call.
#[derive(Default)]
pub(super) struct Scratch {
    packed: tile::Packed,
}

struct Products<'a, W> {
    layout: Layout,
    /// In the form of the layout.
    weights: W,
    rows: &'a Activations,
    packed: &'a mut tile::Packed,
    /// `[weights, rows]`.
    output: &'a mut [f32],
}

impl<'w, W: Iterator<Item = &'w [u8]>> Work for Products<'_, W> {
    fn run<I: Isa>(self, isa: I) {
        let Self {
            layout,
            mut weights,
            rows,
            packed,
            output,
        } = self;
        let count = rows.count();
        if count == 1 {
            let row = rows.row(0);
            layout.with(
                isa,
                row::OneRow {
                    weights,
                    row,
                    output,
                },
            );
            return;
        }
        let superblocks = rows.superblocks();
        let outputs = output.chunks_mut(tile::ROWS * count);
        for output in outputs {
            let mut taken: [&[u8]; tile::ROWS] = [&[]; tile::ROWS];
            let wanted = output.len() / count;
            for (to, weight) in taken.iter_mut().zip(weights.by_ref().take(wanted)) {
                *to = weight;
            }
            layout.with(
                isa,
                tile::Pack {
                    weights: &taken[..wanted],
                    superblocks,
                    packed,
                },
            );
            packed.products(isa, rows, output);
        }
    }
}

/// The sum of eight lanes, by repeated halving.
#[inline(always)]
fn fold<T: Copy>(lanes: [T; 8], add: impl Fn(T, T) -> T) -> T {
    let [a, b, c, d, e, f, g, h] = lanes;
    add(add(add(a, e), add(c, g)), add(add(b, f), add(d, h)))
}

#[cfg(test)]
mod tests;
