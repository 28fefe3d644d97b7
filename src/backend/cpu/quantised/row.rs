//! The product of one row of activations with one stored row of weights, whose codes stay in registers.

use super::super::math::{LINE, prefetch};
use super::activations::Superblock;
use super::fold;
use super::formats::{Codes, Format, WithFormat, eight};
use super::isa::Isa;

/// Prefetch distance in bytes: some hundred cycles of work. Rows are consecutive in memory, so that the end of one row
/// prefetches the next.
const AHEAD: usize = 1024;

/// `output[c] = row . weights[c]`.
pub(super) struct OneRow<'a, W> {
    pub(super) weights: W,
    pub(super) row: &'a [Superblock],
    pub(super) output: &'a mut [f32],
}

impl<'w, I: Isa, W: Iterator<Item = &'w [u8]>> WithFormat<I> for OneRow<'_, W> {
    fn run<F: Format<BYTES>, const BYTES: usize>(self, isa: I, format: F) {
        isa.run(
            #[inline(always)]
            || {
                for (output, bytes) in self.output.iter_mut().zip(self.weights) {
                    *output = product(isa, format, bytes, self.row);
                }
            },
        );
    }
}

/// `row . weight`, where `bytes` is a stored row of `format`.
#[inline(always)]
fn product<I: Isa, F: Format<BYTES>, const BYTES: usize>(
    isa: I,
    format: F,
    bytes: &[u8],
    row: &[Superblock],
) -> f32 {
    let mut lanes = isa.splat(0.0);
    let (whole, rest) = bytes.as_chunks::<BYTES>();
    for (bytes, x) in whole.iter().zip(row) {
        for at in (0..BYTES).step_by(LINE) {
            prefetch(bytes.as_ptr().wrapping_add(AHEAD + at));
        }
        lanes = superblock(isa, format, bytes, x, lanes);
    }
    if !rest.is_empty()
        && let Some(x) = row.get(whole.len())
    {
        let mut bytes = [0; BYTES];
        bytes[..rest.len()].copy_from_slice(rest);
        lanes = superblock(isa, format, &bytes, x, lanes);
    }
    fold(
        isa.store(lanes),
        #[inline(always)]
        |a, b| a + b,
    )
}

#[inline(always)]
fn superblock<I: Isa, F: Format<BYTES>, const BYTES: usize>(
    isa: I,
    format: F,
    bytes: &[u8; BYTES],
    x: &Superblock,
    mut lanes: I::Lanes,
) -> I::Lanes {
    let weights = format.unpack(isa, bytes);
    let dots = eight(
        #[inline(always)]
        |b| {
            let activations = isa.signed_bytes(&x.codes[b]);
            match F::CODES {
                Codes::Signed => isa.signed(weights.codes[b], activations),
                Codes::Unsigned { .. } => {
                    isa.total(isa.unsigned(isa.partial(), weights.codes[b], activations))
                }
            }
        },
    );
    let x_steps = x.totals.steps(F::HALVES).iter();
    for (step, (totals, sums)) in x_steps.zip(x.sums.steps(F::HALVES)).enumerate() {
        let (dots, scales) = if F::HALVES {
            let dots = &dots.as_chunks::<4>().0[step];
            let x = &x.scales.as_chunks::<4>().0[step];
            (isa.sums_of_halves(*dots), isa.twice(x))
        } else {
            (isa.sums(dots), isa.load(&x.scales))
        };
        let dots = F::CODES.less_zero(isa, dots, isa.load_ints(totals));
        let scales = isa.mul(weights.scales[step], scales);
        lanes = isa.mul_add(isa.to_lanes(dots), scales, lanes);
        if F::MINS {
            lanes = isa.mul_add(weights.mins[step], isa.load(sums), lanes);
        }
    }
    lanes
}
