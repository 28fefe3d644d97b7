//! Block formats: integer codes with scales, for consecutive elements of a row.
//!
//! Each format defines how a block is decoded to [`Codes`]; its values, and every product with 8-bit activations, follow from
//! these. The layouts are ggml's (`ggml-common.h`, `dequantize_row_*` of `ggml-quants.c`); the values are ggml's to the bit.

mod encode;
mod grids;
mod k_quants;
mod lattice;
mod of_32;
mod repacked;

pub use encode::Encode;
pub use k_quants::{IQ4_XS, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K};
pub use lattice::{IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS};
pub(crate) use of_32::{E2M1_TWICE, half_power};
pub use of_32::{IQ4_NL, MXFP4, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
pub(super) use repacked::{E4M3, REPACKED};
pub use repacked::{
    FP4, FP4_128, FP8, FP8_64, FP8_128, INT4, INT4_64, INT4_128, INT4_BF16, INT6, INT6_64, INT8,
    INT8_64, INT8_128, Q4_1_64,
};

/// Maximum number of elements in a block.
pub const MOST: usize = 256;
/// Minimum number of elements that share a scale.
const FEWEST: usize = 16;
/// The minimum of symmetric formats: adding it changes no number, not even -0.
pub const NO_MIN: f32 = -0.0;

/// A format of blocks: `length` consecutive elements of a row in `bytes` bytes. A row is whole blocks.
#[derive(Debug)]
pub struct BlockFormat {
    /// Its name in files, listings and messages, which is unique.
    pub name: &'static str,
    /// Elements of a block, at most [`MOST`].
    pub length: usize,
    /// Bytes of a block.
    pub bytes: usize,
    /// Consecutive elements that share a scale and a minimum: 16 or 32, or the whole of a shorter block.
    pub group: usize,
    /// The decoder of a block.
    pub unpack: Unpack,
}

/// Decodes one block.
#[derive(Debug, Clone, Copy)]
pub enum Unpack {
    /// From `bytes` bytes to integers and scales: `length` codes, `length / group` scales and minimums.
    Codes(fn(&[u8], &mut Codes)),
    /// From `bytes` bytes to `length` values, for small floats that 8-bit integers cannot represent.
    Values(fn(&[u8], &mut [f32])),
}

/// A decoded block: element i is `scales[i / group] * codes[i] + mins[i / group]`, two roundings in f32.
#[derive(Debug, Clone)]
pub struct Codes {
    /// `[length]`.
    pub codes: [i8; MOST],
    /// `[length / group]`.
    pub scales: [f32; MOST / FEWEST],
    /// `[length / group]`, added to the product; [`NO_MIN`] in symmetric formats.
    pub mins: [f32; MOST / FEWEST],
}

impl Default for Codes {
    fn default() -> Self {
        Self {
            codes: [0; MOST],
            scales: [0.0; MOST / FEWEST],
            mins: [0.0; MOST / FEWEST],
        }
    }
}

impl BlockFormat {
    /// Widens whole blocks to f32: `[n, bytes]` bytes to `[n, length]` values.
    pub fn widen(&self, bytes: &[u8], values: &mut [f32]) {
        let blocks = bytes.chunks_exact(self.bytes);
        let blocks = blocks.zip(values.chunks_exact_mut(self.length));
        match self.unpack {
            Unpack::Values(unpack) => blocks.for_each(|(bytes, values)| unpack(bytes, values)),
            Unpack::Codes(unpack) => {
                let mut block = Codes::default();
                for (bytes, values) in blocks {
                    unpack(bytes, &mut block);
                    block.values(self.group, values);
                }
            }
        }
    }
}

impl Codes {
    /// The values: `[length]`.
    fn values(&self, group: usize, values: &mut [f32]) {
        let codes = self.codes.chunks(group);
        let scales = self.scales.iter().zip(&self.mins);
        for ((values, codes), (scale, min)) in values.chunks_mut(group).zip(codes).zip(scales) {
            for (value, code) in values.iter_mut().zip(codes) {
                *value = scale * f32::from(*code) + min;
            }
        }
    }
}

impl PartialEq for BlockFormat {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for BlockFormat {}

impl std::hash::Hash for BlockFormat {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.name.hash(state);
    }
}

/// The f16 at byte `at`, widened.
fn half(block: &[u8], at: usize) -> f32 {
    half::f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// The little-endian word at byte `at`.
fn word(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

/// The low and the high four bits.
const fn nibbles(byte: u8) -> [u8; 2] {
    [byte & 15, byte >> 4]
}

/// The 16 values of the formats IQ4: nearer to each other about zero.
pub(crate) const IQ4_VALUES: [i8; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];

#[cfg(test)]
mod tests {
    use super::super::ggml::TYPES;
    use crate::checkpoint::Format;

    /// Three random blocks of each type and the values that ggml makes of them.
    #[test]
    fn blocks_are_widened_as_by_ggml_to_the_bit() {
        let text = include_str!("../../../tests/reference/quant-vectors.json");
        let vectors: serde_json::Value = serde_json::from_str(text).unwrap();
        let mut seen = 0;
        for known in TYPES {
            let Some(format @ Format::Block(block)) = known.format else {
                continue;
            };
            let name = known.name.to_lowercase().replace("_k", "_K");
            let type_vectors = &vectors["types"][name.as_str()];
            assert_eq!(type_vectors["elements"], block.length, "{name}");
            assert_eq!(type_vectors["bytes"], block.bytes, "{name}");
            for case in type_vectors["cases"].as_array().unwrap() {
                let hex = case["block"].as_str().unwrap();
                let bytes = (0..hex.len()).step_by(2);
                let bytes: Vec<u8> = bytes
                    .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
                    .collect();
                let mut values = vec![0.0; block.length];
                format.widen(&bytes, &mut values);
                let expected = case["f32"].as_array().unwrap();
                assert_eq!(expected.len(), values.len(), "{name}");
                for (i, (value, expected)) in values.iter().zip(expected).enumerate() {
                    let expected = u32::from_str_radix(expected.as_str().unwrap(), 16).unwrap();
                    assert_eq!(
                        value.to_bits(),
                        expected,
                        "{name}, element {i}: {value} instead of {}",
                        f32::from_bits(expected)
                    );
                }
                seen += 1;
            }
        }
        assert_eq!(seen, 3 * 18, "NVFP4 alone is not read from GGUF");
    }
}
