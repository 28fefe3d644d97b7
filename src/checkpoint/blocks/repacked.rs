//! Blocks that quantised safetensors files are repacked to where none of ggml's holds their numbers exactly. No file has them.

use super::of_32::{E2M1_TWICE, four, set};
use super::{BlockFormat, NO_MIN, Unpack, half, word};

/// Four bits about a zero point: an f32 scale, the zero point as i8, 32 codes of four bits. Nibbles lie as in Q4_0.
pub static INT4: BlockFormat = BlockFormat {
    name: "INT4",
    length: 32,
    bytes: 21,
    group: 32,
    unpack: Unpack::Codes(|block, to| {
        set(to, single(block, 0), NO_MIN);
        let zero = block[4] as i8;
        four(&block[5..], to, |q, _| q as i8 - zero);
    }),
};

/// Six bits with an f16 scale and an f16 minimum: code i at bits 6i .. 6i + 6 of 24 bytes, little-endian.
pub static INT6: BlockFormat = BlockFormat {
    name: "INT6",
    length: 32,
    bytes: 28,
    group: 32,
    unpack: Unpack::Codes(|block, to| {
        set(to, half(block, 0), half(block, 2));
        let codes = to.codes.as_chunks_mut::<4>().0;
        for (codes, bytes) in codes.iter_mut().zip(block[4..28].as_chunks::<3>().0) {
            let bits = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], 0]);
            *codes = [0, 6, 12, 18].map(|shift| (bits >> shift & 63) as i8);
        }
    }),
};

/// Eight bits with their sign: an f32 scale and an f32 minimum, then the codes.
pub static INT8: BlockFormat = BlockFormat {
    name: "INT8",
    length: 32,
    bytes: 40,
    group: 32,
    unpack: Unpack::Codes(|block, to| {
        set(to, single(block, 0), single(block, 4));
        for (code, byte) in to.codes.iter_mut().zip(&block[8..40]) {
            *code = *byte as i8;
        }
    }),
};

/// Floats of eight bits (e4m3) times an f32 scale, rounded once.
pub static FP8: BlockFormat = BlockFormat {
    name: "FP8",
    length: 32,
    bytes: 36,
    group: 32,
    unpack: Unpack::Values(|block, values| {
        let scale = single(block, 0);
        for (value, byte) in values.iter_mut().zip(&block[4..36]) {
            *value = E4M3[usize::from(*byte)] * scale;
        }
    }),
};

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
        four(&block[8..], to, |q, _| E2M1_TWICE[usize::from(q)]);
    }),
};

/// All of them.
pub(in crate::checkpoint) static REPACKED: [&BlockFormat; 5] = [&INT4, &INT6, &INT8, &FP8, &FP4];

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
