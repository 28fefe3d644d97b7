//! Products of weights in integer codes with activations in eight bits.
//!
//! The numbers are defined once, for every instruction set and for any number of rows. Each 32 activations of a row become
//! codes of eight bits and one scale ([`activations`]); each 32 codes of a weight row have two scales and two minimums, of 16
//! columns each ([`unpack`]). Eight lanes in f32 are summed over the blocks of 32 columns in order: lane l takes the exact
//! integer sum of the products of the codes of columns 4l .. 4l + 3, converted to f32, times the product of the two scales,
//! in one fused multiplication and addition. The minimums are a product of their own, over sums of 16 activations, of which
//! the g-th goes to lane g mod 8. Lanes are folded at the end in one order ([`tile`]).
//!
//! The error is that of the activations, at most half a step of the 127 in the greatest of 32:
//! [`crate::conformance::EIGHT_BIT_ACTIVATIONS`] says what that leaves of a product.

mod activations;
mod isa;
#[cfg(target_arch = "aarch64")]
mod neon;
mod tile;
mod unpack;
#[cfg(target_arch = "x86_64")]
mod x86;

use self::isa::{Isa, Path, Work};
use self::unpack::Layout;
use crate::checkpoint::{BlockFormat, Unpack};

pub(super) use self::activations::Activations;
pub(super) use self::unpack::Weights;

/// Columns that share a scale of the activations.
const BLOCK: usize = 32;
/// Columns of a weight that share a scale and a minimum.
const GROUP: usize = 16;

/// Whether products with weights of this format are those of this module: blocks of integer codes that fit its 32 and 16
/// columns. Other weights are widened.
pub(super) fn applies(format: &BlockFormat) -> bool {
    let codes = matches!(format.unpack, Unpack::Codes(_));
    codes && format.length.is_multiple_of(BLOCK) && format.group.is_multiple_of(GROUP)
}

/// `output[c][r] = rows[r] . weights[c]`: `weights` stored rows of `format`, `output` `[weights, rows]`; `unpacked` is
/// memory that calls may share.
pub(super) fn products<'a>(
    format: &'static BlockFormat,
    weights: impl Iterator<Item = &'a [u8]>,
    rows: &Activations,
    unpacked: &mut Weights,
    output: &mut [f32],
) {
    Path::widest().run(Products {
        layout: Layout::of(format),
        weights,
        rows,
        unpacked,
        output,
    });
}

struct Products<'a, W> {
    layout: Layout,
    weights: W,
    rows: &'a Activations,
    unpacked: &'a mut Weights,
    /// `[weights, rows]`.
    output: &'a mut [f32],
}

impl<'w, W: Iterator<Item = &'w [u8]>> Work for Products<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self {
            layout,
            mut weights,
            rows,
            unpacked,
            output,
        } = self;
        let (count, at_once) = (rows.count(), unpacked.rows());
        for output in output.chunks_mut(at_once * count) {
            let taken = output.len() / count;
            for (i, bytes) in weights.by_ref().take(taken).enumerate() {
                unpacked.unpack(isa, &layout, i, bytes);
            }
            tile::tiles(isa, rows, unpacked, output);
        }
    }
}

#[cfg(test)]
mod tests;
