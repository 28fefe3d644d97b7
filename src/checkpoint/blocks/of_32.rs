//! Blocks of 32 elements with one scale, and a minimum in some: element j in the low four bits of byte j, element j + 16
//! in the high ones.

use super::{BlockFormat, Codes, IQ4_VALUES, NO_MIN, Unpack, half, nibbles, word};

/// Four bits about 8, an f16 scale.
pub static Q4_0: BlockFormat = BlockFormat {
    name: "Q4_0",
    length: 32,
    bytes: 18,
    group: 32,
    unpack: Unpack::Codes(|block, to| {
        set(to, half(block, 0), NO_MIN);
        four(&block[2..], to, |q, _| q as i8 - 8);
    }),
};

/// Four bits, an f16 scale and an f16 minimum.
pub static Q4_1: BlockFormat = BlockFormat {
    name: "Q4_1",
    length: 32,
    bytes: 20,
    group: 32,
    unpack: Unpack::Codes(|block, to| {
        set(to, half(block, 0), half(block, 2));
        four(&block[4..], to, |q, _| q as i8);
    }),
};

/// Five bits about 16, an f16 scale.
pub static Q5_0: BlockFormat = BlockFormat {
    name: "Q5_0",
    length: 32,
    bytes: 22,
    group: 32,
    unpack: Unpack::Codes(|block, to| {
        set(to, half(block, 0), NO_MIN);
        let high = word(block, 2);
        four(&block[6..], to, |q, i| fifth(q, high, i) - 16);
    }),
};

/// Five bits, an f16 scale and an f16 minimum.
pub static Q5_1: BlockFormat = BlockFormat {
    name: "Q5_1",
    length: 32,
    bytes: 24,
    group: 32,
    unpack: Unpack::Codes(|block, to| {
        set(to, half(block, 0), half(block, 2));
        let high = word(block, 4);
        four(&block[8..], to, |q, i| fifth(q, high, i));
    }),
};

/// Eight bits with their sign, an f16 scale.
pub static Q8_0: BlockFormat = BlockFormat {
    name: "Q8_0",
    length: 32,
    bytes: 34,
    group: 32,
    unpack: Unpack::Codes(|block, to| {
        set(to, half(block, 0), NO_MIN);
        for (code, byte) in to.codes.iter_mut().zip(&block[2..34]) {
            *code = *byte as i8;
        }
    }),
};

/// Four bits that index a table, an f16 scale.
pub static IQ4_NL: BlockFormat = BlockFormat {
    name: "IQ4_NL",
    length: 32,
    bytes: 18,
    group: 32,
    unpack: Unpack::Codes(|block, to| {
        set(to, half(block, 0), NO_MIN);
        four(&block[2..], to, |q, _| IQ4_VALUES[usize::from(q)]);
    }),
};

/// OCP's microscaling format: four-bit floats and one power of two. The codes are twice the floats, which are multiples
/// of a half.
pub static MXFP4: BlockFormat = BlockFormat {
    name: "MXFP4",
    length: 32,
    bytes: 17,
    group: 32,
    unpack: Unpack::Codes(|block, to| {
        set(to, half_power(block[0]), NO_MIN);
        four(&block[1..], to, |q, _| E2M1_TWICE[usize::from(q)]);
    }),
};

/// Twice the value of each four-bit float.
pub(crate) const E2M1_TWICE: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// `2^(e - 128)`: half of the power of two that an exponent of eight bits means.
pub(crate) fn half_power(e: u8) -> f32 {
    f32::from_bits(match e {
        0 => 0x0020_0000,
        1 => 0x0040_0000,
        _ => (u32::from(e) - 1) << 23,
    })
}

fn set(to: &mut Codes, scale: f32, min: f32) {
    to.scales[0] = scale;
    to.mins[0] = min;
}

/// Four bits and the `i`-th bit of `high` above them.
fn fifth(q: u8, high: u32, i: usize) -> i8 {
    (q | ((high >> i & 1) as u8) << 4) as i8
}

/// The codes of 16 bytes: `code` of four bits and the element's number.
fn four(bytes: &[u8], to: &mut Codes, code: impl Fn(u8, usize) -> i8) {
    for (j, byte) in bytes.iter().enumerate().take(16) {
        let [low, high] = nibbles(*byte);
        to.codes[j] = code(low, j);
        to.codes[j + 16] = code(high, j + 16);
    }
}
