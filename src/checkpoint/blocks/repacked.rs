//! Blocks that quantised safetensors files are repacked to where none of ggml's holds their numbers exactly, or as briefly. No file
//! has them.
//!
//! Scales are in f32, as in the schemes' formulas. Where a scale applies to 64 or 128 columns, blocks have that length, so
//! that a weight takes hardly more memory than its file.

use super::of_32::E2M1_TWICE;
use super::{BlockFormat, Codes, NO_MIN, Unpack, half, nibbles, word};

/// As Q4_1 in blocks of 64: four bits, an f16 scale and an f16 minimum, then codes whose nibbles lie in each 16 bytes as in Q4_1.
pub static Q4_1_64: BlockFormat = BlockFormat {
    name: "Q4_1_64",
    length: 64,
    bytes: 36,
    group: 32,
    unpack: Unpack::Codes(|block, to| {
        set::<64>(to, half(block, 0), half(block, 2));
        four(&block[4..36], to, |q| q as i8);
    }),
};

/// Four bits about a zero point: an f32 scale, the zero point as i8, then codes of four bits, whose nibbles lie in each 16 bytes as
/// in Q4_0.
pub static INT4: BlockFormat = int4::<32>("INT4");
/// The same in blocks of 64.
pub static INT4_64: BlockFormat = int4::<64>("INT4_64");
/// The same in blocks of 128.
pub static INT4_128: BlockFormat = int4::<128>("INT4_128");

const fn int4<const LENGTH: usize>(name: &'static str) -> BlockFormat {
    BlockFormat {
        name,
        length: LENGTH,
        bytes: 5 + LENGTH / 2,
        group: 32,
        unpack: Unpack::Codes(|block, to| {
            set::<LENGTH>(to, single(block, 0), NO_MIN);
            let zero = block[4] as i8;
            four(&block[5..5 + LENGTH / 2], to, |q| q as i8 - zero);
        }),
    }
}

/// As INT4, with a scale in bf16.
pub static INT4_BF16: BlockFormat = BlockFormat {
    name: "INT4_BF16",
    length: 32,
    bytes: 19,
    group: 32,
    unpack: Unpack::Codes(|block, to| {
        let scale = u32::from(u16::from_le_bytes([block[0], block[1]])) << 16;
        set::<32>(to, f32::from_bits(scale), NO_MIN);
        let zero = block[2] as i8;
        four(&block[3..19], to, |q| q as i8 - zero);
    }),
};

/// Six bits with an f16 scale and an f16 minimum: code i at bits 6i .. 6i + 6 of the bytes after them, little-endian.
pub static INT6: BlockFormat = int6::<32>("INT6");
/// The same in blocks of 64.
pub static INT6_64: BlockFormat = int6::<64>("INT6_64");

const fn int6<const LENGTH: usize>(name: &'static str) -> BlockFormat {
    BlockFormat {
        name,
        length: LENGTH,
        bytes: 4 + LENGTH / 4 * 3,
        group: 32,
        unpack: Unpack::Codes(|block, to| {
            set::<LENGTH>(to, half(block, 0), half(block, 2));
            let bytes = block[4..4 + LENGTH / 4 * 3].as_chunks::<3>().0;
            for (codes, bytes) in to.codes.as_chunks_mut::<4>().0.iter_mut().zip(bytes) {
                let bits = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], 0]);
                *codes = [0, 6, 12, 18].map(|shift| (bits >> shift & 63) as i8);
            }
        }),
    }
}

/// Eight bits with their sign: an f32 scale and an f32 minimum, then the codes.
pub static INT8: BlockFormat = int8::<32>("INT8");
/// The same in blocks of 64.
pub static INT8_64: BlockFormat = int8::<64>("INT8_64");
/// The same in blocks of 128.
pub static INT8_128: BlockFormat = int8::<128>("INT8_128");

const fn int8<const LENGTH: usize>(name: &'static str) -> BlockFormat {
    BlockFormat {
        name,
        length: LENGTH,
        bytes: 8 + LENGTH,
        group: 32,
        unpack: Unpack::Codes(|block, to| {
            set::<LENGTH>(to, single(block, 0), single(block, 4));
            for (code, byte) in to.codes.iter_mut().zip(&block[8..8 + LENGTH]) {
                *code = *byte as i8;
            }
        }),
    }
}

/// Floats of eight bits (e4m3) times an f32 scale, rounded once.
pub static FP8: BlockFormat = fp8::<32>("FP8");
/// The same in blocks of 64.
pub static FP8_64: BlockFormat = fp8::<64>("FP8_64");
/// The same in blocks of 128.
pub static FP8_128: BlockFormat = fp8::<128>("FP8_128");

const fn fp8<const LENGTH: usize>(name: &'static str) -> BlockFormat {
    BlockFormat {
        name,
        length: LENGTH,
        bytes: 4 + LENGTH,
        group: 32,
        unpack: Unpack::Values(|block, values| {
            let scale = single(block, 0);
            for (value, byte) in values.iter_mut().zip(&block[4..4 + LENGTH]) {
                *value = E4M3[usize::from(*byte)] * scale;
            }
        }),
    }
}

/// Floats of four bits (e2m1), an f32 scale for each 16: two scales, then nibbles that lie as in Q4_0. The codes are twice the
/// floats.
pub static FP4: BlockFormat = BlockFormat {
    name: "FP4",
    length: 32,
    bytes: 24,
    group: 16,
    unpack: Unpack::Codes(|block, to| {
        for group in 0..2 {
            to.scales[group] = single(block, 4 * group) * 0.5;
            to.mins[group] = NO_MIN;
        }
        four(&block[8..24], to, |q| E2M1_TWICE[usize::from(q)]);
    }),
};

/// Floats of four bits (e2m1) in blocks of 128: the f32 scale of the whole weight; a byte of 1 where scales are divided by it and 0
/// where they are multiplied; a scale of eight bits (e4m3) for each 16; nibbles that lie in each 16 bytes as in Q4_0.
pub static FP4_128: BlockFormat = BlockFormat {
    name: "FP4_128",
    length: 128,
    bytes: 77,
    group: 16,
    unpack: Unpack::Codes(|block, to| {
        let whole = single(block, 0);
        for (group, scale) in block[5..13].iter().enumerate() {
            let scale = E4M3[usize::from(*scale)];
            let scale = match block[4] {
                1 => scale / whole,
                _ => scale * whole,
            };
            to.scales[group] = scale * 0.5;
            to.mins[group] = NO_MIN;
        }
        four(&block[13..77], to, |q| E2M1_TWICE[usize::from(q)]);
    }),
};

/// All of them.
pub(in crate::checkpoint) static REPACKED: [&BlockFormat; 15] = [
    &Q4_1_64, &INT4, &INT4_64, &INT4_128, &INT4_BF16, &INT6, &INT6_64, &INT8, &INT8_64, &INT8_128,
    &FP8, &FP8_64, &FP8_128, &FP4, &FP4_128,
];

/// One scale and one minimum for all `LENGTH` elements.
fn set<const LENGTH: usize>(to: &mut Codes, scale: f32, min: f32) {
    to.scales[..LENGTH / 32].fill(scale);
    to.mins[..LENGTH / 32].fill(min);
}

/// The codes of 16 bytes for each 32 elements: the low nibbles are the first 16.
fn four(bytes: &[u8], to: &mut Codes, code: impl Fn(u8) -> i8) {
    for (bytes, codes) in bytes.chunks_exact(16).zip(to.codes.chunks_exact_mut(32)) {
        let (first, second) = codes.split_at_mut(16);
        for ((byte, first), second) in bytes.iter().zip(first).zip(second) {
            let [low, high] = nibbles(*byte);
            (*first, *second) = (code(low), code(high));
        }
    }
}

/// The value of each float of eight bits with four of exponent and three of mantissa (OCP's e4m3, "fn": no infinities, one NaN
/// a sign).
pub(in crate::checkpoint) static E4M3: [f32; 256] = e4m3();

const fn e4m3() -> [f32; 256] {
    let mut values = [0.0; 256];
    let mut bits = 0_u32;
    while bits < 256 {
        let (sign, exponent, mantissa) = (bits >> 7, bits >> 3 & 15, bits & 7);
        let magnitude = if exponent == 15 && mantissa == 7 {
            f32::NAN
        } else if exponent == 0 {
            // Multiples of 2^-9.
            mantissa as f32 * f32::from_bits((127 - 9) << 23)
        } else {
            f32::from_bits((exponent + 127 - 7) << 23 | mantissa << 20)
        };
        values[bits as usize] = if sign == 1 { -magnitude } else { magnitude };
        bits += 1;
    }
    values
}

/// The f32 at byte `at`.
fn single(block: &[u8], at: usize) -> f32 {
    f32::from_bits(word(block, at))
}
