//! Blocks of 32 elements with one scale, and a minimum in Q5_1.

use pulp::Arch;

use super::fit::{lanes, symmetric, with_minimum};
use super::{put_half, squares, weighted};

/// Elements of a block.
const BLOCK: usize = 32;

/// Eight bits: the element of largest size is 127. Importance does not change it.
pub(super) fn q8_0(row: &[f32], _: Option<&[f32]>, bytes: &mut [u8]) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for (x, block) in row.chunks_exact(BLOCK).zip(bytes.chunks_exact_mut(34)) {
                let size = x.iter().fold(0.0_f32, |size, x| size.max(x.abs()));
                let scale = size / 127.0;
                let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
                put_half(block, 0, scale);
                for (byte, x) in block[2..].iter_mut().zip(x) {
                    *byte = (x * inverse).round() as i8 as u8;
                }
            }
        },
    );
}

/// Four bits about 8: the element of largest size is 0, which stands for -8.
pub(super) fn q4_0(row: &[f32], importance: Option<&[f32]>, bytes: &mut [u8]) {
    about_middle(row, importance, bytes, 8, 18, |codes, block| {
        nibbles(codes, &mut block[2..]);
    });
}

/// Five bits about 16.
pub(super) fn q5_0(row: &[f32], importance: Option<&[f32]>, bytes: &mut [u8]) {
    about_middle(row, importance, bytes, 16, 22, |codes, block| {
        block[2..6].copy_from_slice(&fifth_bits(codes));
        nibbles(codes, &mut block[6..]);
    });
}

/// Five bits and a minimum.
pub(super) fn q5_1(row: &[f32], importance: Option<&[f32]>, bytes: &mut [u8]) {
    let spread = squares(row) / row.len() as f32;
    let blocks = row.chunks_exact(BLOCK).zip(bytes.chunks_exact_mut(24));
    for (i, (x, block)) in blocks.enumerate() {
        let codes = match importance {
            Some(importance) => {
                let mut weights = [0.0; BLOCK];
                weighted(&importance[BLOCK * i..], spread, x, &mut weights);
                let (x, weights) = (lanes::<1, BLOCK>(x), lanes(&weights));
                let fit = with_minimum(&x, &weights, 31, [-0.9, 0.05], 37);
                put_half(block, 0, fit.scale[0]);
                put_half(block, 2, -fit.min[0]);
                fit.codes(&x, [0, 31]).map(|[code]| code)
            }
            None => {
                let min = x
                    .iter()
                    .fold(x[0], |min, x| if *x < min { *x } else { min });
                let max = x
                    .iter()
                    .fold(x[0], |max, x| if *x > max { *x } else { max });
                let scale = (max - min) / 31.0;
                let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
                put_half(block, 0, scale);
                put_half(block, 2, min);
                std::array::from_fn(|i| (((x[i] - min) * inverse + 0.5) as i32).min(31))
            }
        };
        block[4..8].copy_from_slice(&fifth_bits(&codes));
        nibbles(&codes, &mut block[8..]);
    }
}

/// Blocks of an f16 scale and `2 * middle` levels about the middle.
fn about_middle(
    row: &[f32],
    importance: Option<&[f32]>,
    bytes: &mut [u8],
    middle: i32,
    size: usize,
    write: impl Fn(&[i32; BLOCK], &mut [u8]),
) {
    let spread = squares(row) / row.len() as f32;
    let blocks = row.chunks_exact(BLOCK).zip(bytes.chunks_exact_mut(size));
    for (i, (x, block)) in blocks.enumerate() {
        let codes = match importance {
            Some(importance) => {
                let mut weights = [0.0; BLOCK];
                weighted(&importance[BLOCK * i..], spread, x, &mut weights);
                let (x, weights) = (lanes::<1, BLOCK>(x), lanes(&weights));
                let fit = symmetric(&x, &weights, middle);
                put_half(block, 0, fit.scale[0]);
                let codes = fit.codes(&x, [-middle, middle - 1]);
                // ggml writes zeros, not the middle, for a block of zeros; its scale is zero.
                let zero = fit.scale[0] == 0.0;
                codes.map(|[code]| if zero { 0 } else { code + middle })
            }
            None => {
                let extreme =
                    x.iter().fold(
                        0.0_f32,
                        |extreme, x| {
                            if extreme.abs() < x.abs() { *x } else { extreme }
                        },
                    );
                let scale = extreme / -(middle as f32);
                let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
                put_half(block, 0, scale);
                let half = middle as f32 + 0.5;
                std::array::from_fn(|i| ((x[i] * inverse + half) as i32).min(2 * middle - 1))
            }
        };
        write(&codes, block);
    }
}

/// Element j in the low four bits of byte j, element j + 16 in the high ones.
pub(super) fn nibbles(codes: &[i32; BLOCK], bytes: &mut [u8]) {
    let (low, high) = codes.split_at(BLOCK / 2);
    for ((byte, low), high) in bytes.iter_mut().zip(low).zip(high) {
        *byte = (low & 15 | (high & 15) << 4) as u8;
    }
}

/// The fifth bit of each element.
fn fifth_bits(codes: &[i32; BLOCK]) -> [u8; 4] {
    let bits = codes.iter().enumerate();
    let bits = bits.fold(0_u32, |bits, (i, code)| {
        bits | ((code >> 4 & 1) as u32) << i
    });
    bits.to_le_bytes()
}
