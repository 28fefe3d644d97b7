//! Blocks of 256 elements, whose groups of 16 or 32 have small integer scales of their own.

use pulp::Arch;

use super::fit::{Lanes, ZERO, lanes, nearest, positive, symmetric, with_minimum};
use super::{put_half, squares, weighted};

/// Elements of a block.
const BLOCK: usize = 256;

/// Calls `encode` with each block's elements, their importance and its bytes, in code for the widest vectors of this CPU.
#[inline(always)]
fn blocks(
    row: &[f32],
    importance: Option<&[f32]>,
    bytes: &mut [u8],
    size: usize,
    encode: impl Fn(&[f32], Option<&[f32]>, &mut [u8]),
) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            let blocks = row.chunks_exact(BLOCK).zip(bytes.chunks_exact_mut(size));
            for (i, (x, block)) in blocks.enumerate() {
                let importance = importance.map(|all| &all[BLOCK * i..BLOCK * (i + 1)]);
                block.fill(0);
                encode(x, importance, block);
            }
        },
    );
}

/// Three bits about 4; scales of six bits for each 16. Without importance, errors count by the square of the element.
pub(super) fn q3_k(row: &[f32], importance: Option<&[f32]>, bytes: &mut [u8]) {
    blocks(
        row,
        importance,
        bytes,
        110,
        #[inline(always)]
        |x, importance, block| {
            let weights = importance.map_or_else(|| own_squares(x), |all| by_importance(all, x));
            let sums = sums_of_groups::<16>(&weights);
            let (lanes_x, weights): (Lanes<16, 16>, Lanes<16, 16>) = (lanes(x), lanes(&weights));
            let fit = symmetric(&lanes_x, &weights, 4);
            let of_groups = fit.scale.map(|scale| [scale]);
            let of_block = symmetric(&of_groups, &sums.map(|sum| [sum]), 32);
            let zero = of_groups.iter().all(|[scale]| scale.abs() < ZERO);
            let d = put_half(block, 108, of_block.scale[0]);
            let scales = of_block.codes(&of_groups, [-32, 31]).map(|[scale]| scale);
            // ggml writes zeros, which mean -32, for a block of zeros; its scale is zero.
            let scales = if zero { [-32; 16] } else { scales };
            for (j, scale) in scales.iter().enumerate() {
                let stored = (scale + 32) as u8;
                block[96 + j % 8] |= (stored & 15) << (4 * (j / 8));
                block[104 + j % 4] |= (stored >> 4) << (2 * (j / 4));
            }
            let mut codes = in_order(&fit.codes(&lanes_x, [-4, 3]), |code| code + 4);
            // Zeros, as above.
            for (group, x) in codes.chunks_exact_mut(16).zip(x.chunks_exact(16)) {
                if x.iter().all(|x| x.abs() < ZERO) {
                    group.fill(0);
                }
            }
            rounded(
                x,
                &mut codes,
                16,
                |g| [d * scales[g] as f32, 0.0],
                [-4, 3, 4],
            );
            for (i, code) in codes.iter().enumerate() {
                block[i % 32] |= (code >> 2) << (i / 32);
                block[32 + 32 * (i / 128) + i % 32] |= (code & 3) << (2 * (i % 128 / 32));
            }
        },
    );
}

/// Four bits; scales and minimums of six bits for each 32.
pub(super) fn q4_k(row: &[f32], importance: Option<&[f32]>, bytes: &mut [u8]) {
    blocks(
        row,
        importance,
        bytes,
        144,
        #[inline(always)]
        |x, importance, block| {
            let codes = with_minimums(x, importance, block, 15, ([-1.0, 0.1], 21));
            for (i, code) in codes.iter().enumerate() {
                block[16 + 32 * (i / 64) + i % 32] |= code << (4 * (i % 64 / 32));
            }
        },
    );
}

/// Five bits; scales and minimums of six bits for each 32.
pub(super) fn q5_k(row: &[f32], importance: Option<&[f32]>, bytes: &mut [u8]) {
    blocks(
        row,
        importance,
        bytes,
        176,
        #[inline(always)]
        |x, importance, block| {
            let codes = with_minimums(x, importance, block, 31, ([-0.5, 0.1], 16));
            for (i, code) in codes.iter().enumerate() {
                block[16 + i % 32] |= (code >> 4) << (i / 32);
                block[48 + 32 * (i / 64) + i % 32] |= (code & 15) << (4 * (i % 64 / 32));
            }
        },
    );
}

/// Six bits about 32; scales of eight bits for each 16.
pub(super) fn q6_k(row: &[f32], importance: Option<&[f32]>, bytes: &mut [u8]) {
    blocks(
        row,
        importance,
        bytes,
        210,
        #[inline(always)]
        |x, importance, block| {
            let own = own_squares(x);
            let lanes_x: Lanes<16, 16> = lanes(x);
            let fit = symmetric(&lanes_x, &lanes(importance.unwrap_or(&own)), 32);
            let largest = fit.scale.iter().fold(0.0_f32, |largest, scale| {
                if scale.abs() > largest.abs() {
                    *scale
                } else {
                    largest
                }
            });
            if largest.abs() < ZERO {
                return;
            }
            let inverse = -128.0 / largest;
            let d = put_half(block, 208, 1.0 / inverse);
            let scales = fit.scale.map(|scale| nearest(inverse * scale).min(127));
            for (byte, scale) in block[192..208].iter_mut().zip(scales) {
                *byte = scale as i8 as u8;
            }
            let mut codes = in_order(&fit.codes(&lanes_x, [-32, 31]), |code| code + 32);
            for (group, x) in codes.chunks_exact_mut(16).zip(x.chunks_exact(16)) {
                // As ggml writes them; their scale is zero.
                if x.iter().all(|x| x.abs() < ZERO) {
                    group.fill(0);
                }
            }
            rounded(
                x,
                &mut codes,
                16,
                |g| [d * scales[g] as f32, 0.0],
                [-32, 31, 32],
            );
            for (i, code) in codes.iter().enumerate() {
                let (n, group, lane) = (i / 128, i % 128 / 32, i % 32);
                block[64 * n + lane + 32 * (group & 1)] |= (code & 15) << (4 * (group >> 1));
                block[128 + 32 * n + lane] |= (code >> 4) << (2 * group);
            }
        },
    );
}

/// Scales and minimums of Q4_K and Q5_K, which it writes, and the integers; `search` are the tries without importance.
#[inline(always)]
fn with_minimums(
    x: &[f32],
    importance: Option<&[f32]>,
    block: &mut [u8],
    levels: i32,
    search: ([f32; 2], u8),
) -> [u8; BLOCK] {
    let lanes_x: Lanes<8, 32> = lanes(x);
    let fit;
    let (scales, mins, d, dmin);
    if let Some(importance) = importance {
        let weights = by_importance(importance, x);
        let sums = sums_of_groups::<8>(&weights);
        fit = with_minimum(&lanes_x, &lanes(&weights), levels, [-0.9, 0.05], 37);
        (d, scales) = positive(&fit.scale, &sums, 63);
        (dmin, mins) = positive(&fit.min, &sums, 63);
    } else {
        fit = with_minimum(&lanes_x, &lanes(&by_size(x)), levels, search.0, search.1);
        let largest = |all: &[f32; 8]| all.iter().fold(0.0_f32, |a, b| if *b > a { *b } else { a });
        let [scale, min] = [largest(&fit.scale), largest(&fit.min)];
        let six = |all: &[f32; 8], largest: f32| {
            let inverse = if largest > 0.0 { 63.0 / largest } else { 0.0 };
            all.map(|one| nearest(inverse * one).min(63))
        };
        (scales, mins) = (six(&fit.scale, scale), six(&fit.min, min));
        (d, dmin) = (scale / 63.0, min / 63.0);
    }
    let (d, dmin) = (put_half(block, 0, d), put_half(block, 2, dmin));
    six_bits(&scales, &mins, &mut block[4..16]);
    let mut codes = in_order(&fit.codes(&lanes_x, [0, levels]), |code| code);
    let of_group = |g: usize| [d * scales[g] as f32, dmin * mins[g] as f32];
    rounded(x, &mut codes, 32, of_group, [0, levels, 0]);
    codes
}

/// Eight pairs of six bits in twelve bytes.
fn six_bits(scales: &[i32; 8], mins: &[i32; 8], packed: &mut [u8]) {
    for (j, (scale, min)) in scales.iter().zip(mins).enumerate() {
        let (scale, min) = (*scale as u8, *min as u8);
        if j < 4 {
            packed[j] |= scale;
            packed[j + 4] |= min;
        } else {
            packed[j + 4] = (scale & 15) | (min & 15) << 4;
            packed[j - 4] |= scale >> 4 << 6;
            packed[j] |= min >> 4 << 6;
        }
    }
}

/// The integers for the scales as they are stored: `clamp(nearest((x + min) / scale)) + offset`, group by group. Where the scale is zero they
/// stay those of the search.
#[inline(always)]
fn rounded(
    x: &[f32],
    codes: &mut [u8; BLOCK],
    group: usize,
    of_group: impl Fn(usize) -> [f32; 2],
    [least, most, offset]: [i32; 3],
) {
    let groups = x.chunks_exact(group).zip(codes.chunks_exact_mut(group));
    for (g, (x, codes)) in groups.enumerate() {
        let [scale, min] = of_group(g);
        if scale == 0.0 {
            continue;
        }
        for (x, code) in x.iter().zip(codes) {
            *code = (nearest((x + min) / scale).clamp(least, most) + offset) as u8;
        }
    }
}

/// Integers of lanes in the order of the elements.
#[inline(always)]
fn in_order<const G: usize, const L: usize>(
    codes: &[[i32; G]; L],
    stored: impl Fn(i32) -> i32,
) -> [u8; BLOCK] {
    std::array::from_fn(|i| stored(codes[i % L][i / L]) as u8)
}

/// The weight of an error with importance: `importance * sqrt(2 mean(x^2) + x^2)`.
#[inline(always)]
fn by_importance(importance: &[f32], x: &[f32]) -> [f32; BLOCK] {
    let mut weights = [0.0; BLOCK];
    weighted(importance, 2.0 * squares(x) / BLOCK as f32, x, &mut weights);
    weights
}

/// The weight of an error in groups of 32 without importance: `rms(group) + |x|`.
#[inline(always)]
fn by_size(x: &[f32]) -> [f32; BLOCK] {
    let mut weights = [0.0; BLOCK];
    for (weights, x) in weights.chunks_exact_mut(32).zip(x.chunks_exact(32)) {
        let rms = (squares(x) / 32.0).sqrt();
        for (weight, x) in weights.iter_mut().zip(x) {
            *weight = rms + x.abs();
        }
    }
    weights
}

#[inline(always)]
fn own_squares(x: &[f32]) -> [f32; BLOCK] {
    std::array::from_fn(|i| x[i] * x[i])
}

/// The weights of each group together, added in order.
#[inline(always)]
fn sums_of_groups<const G: usize>(weights: &[f32; BLOCK]) -> [f32; G] {
    let length = BLOCK / G;
    std::array::from_fn(|g| {
        let group = &weights[g * length..(g + 1) * length];
        group.iter().fold(0.0, |sum, weight| sum + weight)
    })
}
