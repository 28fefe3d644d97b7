//! Blocks of 256 elements whose magnitudes are rows of a table, eight or four at a time, with signs beside them.

use super::{BlockFormat, Codes, NO_MIN, Unpack, grids, half, nibbles, word};

/// Eight magnitudes from 256 rows; a scale of four bits for each 32.
pub static IQ2_XXS: BlockFormat = BlockFormat {
    name: "IQ2_XXS",
    length: 256,
    bytes: 66,
    group: 32,
    unpack: Unpack::Codes(|block, to| {
        let d = half(block, 0);
        for group in 0..8 {
            let at = 2 + 8 * group;
            let packed = word(block, at + 4);
            scale(to, group, d * (0.5 + (packed >> 28) as f32) * 0.25);
            for l in 0..4 {
                let row = grids::eight(grids::IQ2_XXS[usize::from(block[at + l])]);
                signed(to, 32 * group + 8 * l, row, even(packed >> (7 * l)));
            }
        }
    }),
};

/// Eight magnitudes from 512 rows; a scale of four bits for each 16.
pub static IQ2_XS: BlockFormat = BlockFormat {
    name: "IQ2_XS",
    length: 256,
    bytes: 74,
    group: 16,
    unpack: Unpack::Codes(|block, to| {
        let d = half(block, 0);
        fine_scales(to, d, &block[66..74]);
        for g in 0..32 {
            let packed = u16::from_le_bytes([block[2 + 2 * g], block[3 + 2 * g]]);
            let row = grids::eight(grids::IQ2_XS[usize::from(packed & 511)]);
            signed(to, 8 * g, row, even(u32::from(packed >> 9)));
        }
    }),
};

/// Eight magnitudes from 1,024 rows with all signs; a scale of four bits for each 16.
pub static IQ2_S: BlockFormat = BlockFormat {
    name: "IQ2_S",
    length: 256,
    bytes: 82,
    group: 16,
    unpack: Unpack::Codes(|block, to| {
        let d = half(block, 0);
        fine_scales(to, d, &block[74..82]);
        for g in 0..32 {
            let top = block[66 + g / 4] >> (2 * (g % 4)) & 3;
            let index = usize::from(block[2 + g]) | usize::from(top) << 8;
            signed(to, 8 * g, grids::eight(grids::IQ2_S[index]), block[34 + g]);
        }
    }),
};

/// Four magnitudes from 256 rows; a scale of four bits for each 32.
pub static IQ3_XXS: BlockFormat = BlockFormat {
    name: "IQ3_XXS",
    length: 256,
    bytes: 98,
    group: 32,
    unpack: Unpack::Codes(|block, to| {
        let d = half(block, 0);
        for group in 0..8 {
            let packed = word(block, 66 + 4 * group);
            scale(to, group, d * (0.5 + (packed >> 28) as f32) * 0.5);
            for l in 0..4 {
                let at = 2 + 8 * group + 2 * l;
                let rows = [block[at], block[at + 1]];
                let [a, b] = rows.map(|row| grids::four_of_62(grids::IQ3_XXS[usize::from(row)]));
                let row = [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]];
                signed(to, 32 * group + 8 * l, row, even(packed >> (7 * l)));
            }
        }
    }),
};

/// Four magnitudes from 512 rows with all signs; a scale of four bits for each 32.
pub static IQ3_S: BlockFormat = BlockFormat {
    name: "IQ3_S",
    length: 256,
    bytes: 110,
    group: 32,
    unpack: Unpack::Codes(|block, to| {
        let d = half(block, 0);
        for group in 0..8 {
            let nibble = nibbles(block[106 + group / 2])[group % 2];
            scale(to, group, d * f32::from(1 + 2 * nibble));
        }
        for g in 0..32 {
            let [a, b] = [2 * g, 2 * g + 1].map(|quad| {
                let top = block[66 + quad / 8] >> (quad % 8) & 1;
                let index = usize::from(block[2 + quad]) | usize::from(top) << 8;
                grids::four_of_15(grids::IQ3_S[index])
            });
            let row = [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]];
            signed(to, 8 * g, row, block[74 + g]);
        }
    }),
};

fn scale(to: &mut Codes, group: usize, value: f32) {
    to.scales[group] = value;
    to.mins[group] = NO_MIN;
}

/// A scale for each 16 elements: `d (1/2 + four bits) / 4`.
fn fine_scales(to: &mut Codes, d: f32, packed: &[u8]) {
    for group in 0..16 {
        let nibble = nibbles(packed[group / 2])[group % 2];
        scale(to, group, d * (0.5 + f32::from(nibble)) * 0.25);
    }
}

/// Seven signs, and an eighth that makes the number of minus signs even.
fn even(signs: u32) -> u8 {
    let seven = (signs & 127) as u8;
    seven | ((seven.count_ones() & 1) as u8) << 7
}

/// Eight codes from `at` on: the magnitudes, negative where their bit of `signs` is set.
fn signed(to: &mut Codes, at: usize, magnitudes: [i8; 8], signs: u8) {
    for (j, magnitude) in magnitudes.into_iter().enumerate() {
        let negative = signs >> j & 1 == 1;
        to.codes[at + j] = if negative { -magnitude } else { magnitude };
    }
}
