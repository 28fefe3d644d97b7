//! Blocks of 256 elements whose groups of 16 or 32 have small integer scales of their own, times one f16.

use super::{BlockFormat, Codes, IQ4_VALUES, NO_MIN, Unpack, half, nibbles};

/// Two bits; scales and minimums of four bits for each 16.
pub static Q2_K: BlockFormat = BlockFormat {
    name: "Q2_K",
    length: 256,
    bytes: 84,
    group: 16,
    unpack: Unpack::Codes(|block, to| {
        let (d, dmin) = (half(block, 80), half(block, 82));
        for (group, packed) in block[..16].iter().enumerate() {
            let [scale, min] = nibbles(*packed).map(f32::from);
            to.scales[group] = d * scale;
            to.mins[group] = -(dmin * min);
        }
        for i in 0..256 {
            to.codes[i] = two_bits(&block[16..80], i) as i8;
        }
    }),
};

/// Three bits; scales of six bits for each 16.
pub static Q3_K: BlockFormat = BlockFormat {
    name: "Q3_K",
    length: 256,
    bytes: 110,
    group: 16,
    unpack: Unpack::Codes(|block, to| {
        let (high, packed, d) = (&block[..32], &block[96..108], half(block, 108));
        for group in 0..16 {
            let low = nibbles(packed[group % 8])[group / 8];
            let top = packed[8 + group % 4] >> (2 * (group / 4)) & 3;
            to.scales[group] = d * f32::from((low | top << 4) as i8 - 32);
            to.mins[group] = NO_MIN;
        }
        for i in 0..256 {
            let set = high[i % 32] >> (i / 32) & 1;
            to.codes[i] = two_bits(&block[32..96], i) as i8 - if set == 1 { 0 } else { 4 };
        }
    }),
};

/// Four bits; scales and minimums of six bits for each 32.
pub static Q4_K: BlockFormat = BlockFormat {
    name: "Q4_K",
    length: 256,
    bytes: 144,
    group: 32,
    unpack: Unpack::Codes(|block, to| {
        six_bits(block, to);
        for i in 0..256 {
            to.codes[i] = four_bits(&block[16..], i) as i8;
        }
    }),
};

/// Five bits; scales and minimums of six bits for each 32.
pub static Q5_K: BlockFormat = BlockFormat {
    name: "Q5_K",
    length: 256,
    bytes: 176,
    group: 32,
    unpack: Unpack::Codes(|block, to| {
        six_bits(block, to);
        for i in 0..256 {
            let fifth = block[16 + i % 32] >> (i / 32) & 1;
            to.codes[i] = (four_bits(&block[48..], i) | fifth << 4) as i8;
        }
    }),
};

/// Six bits about 32; scales of eight bits for each 16.
pub static Q6_K: BlockFormat = BlockFormat {
    name: "Q6_K",
    length: 256,
    bytes: 210,
    group: 16,
    unpack: Unpack::Codes(|block, to| {
        let (low, high, d) = (&block[..128], &block[128..192], half(block, 208));
        for group in 0..16 {
            to.scales[group] = d * f32::from(block[192 + group] as i8);
            to.mins[group] = NO_MIN;
        }
        for i in 0..256 {
            let (n, group, lane) = (i / 128, i % 128 / 32, i % 32);
            let bits = nibbles(low[64 * n + lane + 32 * (group & 1)])[group >> 1];
            let top = high[32 * n + lane] >> (2 * group) & 3;
            to.codes[i] = (bits | top << 4) as i8 - 32;
        }
    }),
};

/// Four bits that index a table; scales of six bits for each 32.
pub static IQ4_XS: BlockFormat = BlockFormat {
    name: "IQ4_XS",
    length: 256,
    bytes: 136,
    group: 32,
    unpack: Unpack::Codes(|block, to| {
        let (d, high) = (half(block, 0), u16::from_le_bytes([block[2], block[3]]));
        for group in 0..8 {
            let low = nibbles(block[4 + group / 2])[group % 2];
            let top = (high >> (2 * group) & 3) as u8;
            to.scales[group] = d * f32::from((low | top << 4) as i8 - 32);
            to.mins[group] = NO_MIN;
            for j in 0..16 {
                let codes = nibbles(block[8 + 16 * group + j]).map(usize::from);
                to.codes[32 * group + j] = IQ4_VALUES[codes[0]];
                to.codes[32 * group + 16 + j] = IQ4_VALUES[codes[1]];
            }
        }
    }),
};

/// The two bits of element `i`: four elements that are 32 apart share a byte.
fn two_bits(bytes: &[u8], i: usize) -> u8 {
    bytes[32 * (i / 128) + i % 32] >> (2 * (i % 128 / 32)) & 3
}

/// The four bits of element `i`: two elements that are 32 apart share a byte.
fn four_bits(bytes: &[u8], i: usize) -> u8 {
    nibbles(bytes[32 * (i / 64) + i % 32])[i % 64 / 32]
}

/// Scales and minimums of Q4_K and Q5_K: two f16, then eight pairs of six bits in twelve bytes.
fn six_bits(block: &[u8], to: &mut Codes) {
    let (d, dmin, packed) = (half(block, 0), half(block, 2), &block[4..16]);
    for group in 0..8 {
        let (scale, min) = if group < 4 {
            (packed[group] & 63, packed[group + 4] & 63)
        } else {
            let [scale, min] = nibbles(packed[group + 4]);
            (
                scale | packed[group - 4] >> 6 << 4,
                min | packed[group] >> 6 << 4,
            )
        };
        to.scales[group] = d * f32::from(scale);
        to.mins[group] = -(dmin * f32::from(min));
    }
}
