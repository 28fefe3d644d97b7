//! Four bits that index a table of unevenly spaced values.

use pulp::Arch;

use super::super::IQ4_VALUES;
use super::fit::{Lanes, ZERO, lanes, nearest};
use super::of_32::nibbles;
use super::{put_half, squares, weighted};

/// Elements that share a scale.
const GROUP: usize = 32;
/// Scales that are tried on either side of the first.
const TRIES: i32 = 7;

/// Blocks of 32, with an f16 scale.
pub(super) fn iq4_nl(row: &[f32], importance: Option<&[f32]>, bytes: &mut [u8]) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            let blocks = row.chunks_exact(GROUP).zip(bytes.chunks_exact_mut(18));
            for (i, (x, block)) in blocks.enumerate() {
                let importance = importance.map(|all| &all[GROUP * i..GROUP * (i + 1)]);
                let [scale] = scales::<1>(x, importance);
                put_half(block, 0, scale);
                nibbles(&codes(x, inverse(scale)), &mut block[2..]);
            }
        },
    );
}

/// Blocks of 256: a scale of six bits for each 32, times one f16.
pub(super) fn iq4_xs(row: &[f32], importance: Option<&[f32]>, bytes: &mut [u8]) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            let blocks = row.chunks_exact(256).zip(bytes.chunks_exact_mut(136));
            for (i, (x, block)) in blocks.enumerate() {
                let importance = importance.map(|all| &all[256 * i..256 * (i + 1)]);
                let scales = scales::<8>(x, importance);
                let largest = scales.iter().fold(0.0_f32, |largest, scale| {
                    if scale.abs() > largest.abs() {
                        *scale
                    } else {
                        largest
                    }
                });
                let d = -largest / 32.0;
                put_half(block, 0, d);
                let mut high = 0_u16;
                block[4..8].fill(0);
                for (g, x) in x.chunks_exact(GROUP).enumerate() {
                    let scale = nearest(inverse(d) * scales[g]).clamp(-32, 31);
                    let at = 8 + 16 * g;
                    nibbles(
                        &codes(x, inverse(d * scale as f32)),
                        &mut block[at..at + 16],
                    );
                    let stored = scale + 32;
                    block[4 + g / 2] |= ((stored & 15) as u8) << (4 * (g % 2));
                    high |= ((stored >> 4) as u16) << (2 * g);
                }
                block[2..4].copy_from_slice(&high.to_le_bytes());
            }
        },
    );
}

#[inline(always)]
fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

/// The index of the value in the table that is nearest to x; the larger one of two.
#[inline(always)]
fn index(x: f32) -> i32 {
    let pairs = IQ4_VALUES.array_windows();
    pairs.fold(0, |index, pair| index + i32::from(x >= middle(*pair)))
}

/// That value, without a look-up, so that loops over it become vectors.
#[inline(always)]
fn value(x: f32) -> f32 {
    let pairs = IQ4_VALUES.array_windows();
    pairs.fold(f32::from(IQ4_VALUES[0]), |value, pair| {
        let step = f32::from(pair[1]) - f32::from(pair[0]);
        value + if x >= middle(*pair) { step } else { 0.0 }
    })
}

#[inline(always)]
fn middle([low, high]: [i8; 2]) -> f32 {
    0.5 * (f32::from(low) + f32::from(high))
}

#[inline(always)]
fn codes(x: &[f32], inverse: f32) -> [i32; GROUP] {
    std::array::from_fn(|i| index(inverse * x[i]))
}

/// The scale of each group of a block: the largest element is put near the end of the table, at fifteen places, and the least weighted
/// error counts.
#[inline(always)]
fn scales<const G: usize>(x: &[f32], importance: Option<&[f32]>) -> [f32; G] {
    let spread = squares(x) * (2.0 / x.len() as f32);
    let mut weights = [0.0; 256];
    let weights = &mut weights[..x.len()];
    match importance {
        Some(importance) => weighted(importance, spread, x, weights),
        None => weights
            .iter_mut()
            .zip(x)
            .for_each(|(weight, x)| *weight = x * x),
    }
    let (x, weights): (Lanes<G, GROUP>, Lanes<G, GROUP>) = (lanes(x), lanes(weights));
    let mut extreme = [0.0_f32; G];
    for x in &x {
        for g in 0..G {
            let larger = x[g].abs() > extreme[g].abs();
            extreme[g] = if larger { x[g] } else { extreme[g] };
        }
    }
    let first = f32::from(IQ4_VALUES[0]);
    let (mut scale, mut most_explained) = ([0.0; G], [0.0; G]);
    for i in -TRIES - 1..=TRIES {
        let begins = i < -TRIES;
        let mut inverse = [0.0; G];
        for g in 0..G {
            inverse[g] = match begins {
                true => 1.0 / (-extreme[g] / first),
                false => (i as f32 + first) / extreme[g],
            };
        }
        let (mut sum_qx, mut sum_q2) = ([0.0; G], [0.0; G]);
        for (x, w) in x.iter().zip(&weights) {
            for g in 0..G {
                let q = value(inverse[g] * x[g]);
                sum_qx[g] += w[g] * q * x[g];
                sum_q2[g] += w[g] * q * q;
            }
        }
        for g in 0..G {
            let some = sum_q2[g] > 0.0;
            let explains = some && sum_qx[g] * sum_qx[g] > most_explained[g] * sum_q2[g];
            let better = begins || explains;
            let tried = if some { sum_qx[g] / sum_q2[g] } else { 0.0 };
            scale[g] = if better { tried } else { scale[g] };
            most_explained[g] = if better {
                tried * sum_qx[g]
            } else {
                most_explained[g]
            };
        }
    }
    std::array::from_fn(|g| {
        if extreme[g].abs() < ZERO {
            0.0
        } else {
            scale[g]
        }
    })
}
