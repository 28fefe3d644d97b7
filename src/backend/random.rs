//! Random numbers that a device generates, so that a model of any size can be measured without its files: uniform, seeded,
//! and the same to the bit on every backend. They are for measurements and tests only.

use super::{Place, Weight};
use crate::checkpoint::Format;
use crate::error::BackendError;

/// Uniform numbers in `mean - 2^exponent .. mean + 2^exponent`, each a function of its index and the seed alone.
///
/// The hash is two rounds of an integer finaliser over the element's index modulo 2^32. The scale is a power of two, so that
/// the number is exact before the mean is added and every backend rounds it equally.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Random {
    /// Differs between tensors.
    pub seed: u32,
    /// Their mean.
    pub mean: f32,
    /// The greatest distance from the mean, as a power of two.
    pub exponent: i32,
}

/// A weight that a backend generates.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct RandomWeight {
    /// Its name, for messages.
    pub name: String,
    /// The dtype that it is stored in: bf16 or f32.
    pub format: Format,
    /// Matrices in the stack.
    pub stack: usize,
    /// Rows per matrix.
    pub rows: usize,
    /// Columns per row.
    pub columns: usize,
    /// Where it belongs in a model that several devices share.
    pub place: Place,
    /// Its numbers; the index of an element counts through stack, rows and columns.
    pub random: Random,
}

/// Mixes the bits of a word.
const fn mix(mut x: u32) -> u32 {
    x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

impl Random {
    /// Numbers around zero for a tensor of this name.
    #[must_use]
    pub fn named(name: &str, seed: u32, exponent: i32) -> Self {
        // FNV-1a.
        let hash = name.bytes().fold(0x811c_9dc5 ^ seed, |hash, byte| {
            (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
        });
        Self {
            seed: hash,
            mean: 0.0,
            exponent,
        }
    }

    /// The same numbers around another mean.
    #[must_use]
    pub fn about(self, mean: f32) -> Self {
        Self { mean, ..self }
    }

    /// Numbers for another layer, or for another part of a layer.
    #[must_use]
    pub(crate) fn part(self, number: usize) -> Self {
        let seed = mix(self.seed.wrapping_add(number as u32));
        Self { seed, ..self }
    }

    /// Numbers whose part `n` is part `first + n` of these.
    #[must_use]
    #[cfg(not(target_arch = "wasm32"))]
    pub(crate) fn parts_from(self, first: usize) -> Self {
        let seed = self.seed.wrapping_add(first as u32);
        Self { seed, ..self }
    }

    /// The greatest distance from the mean.
    #[must_use]
    pub fn scale(&self) -> f32 {
        2.0_f32.powi(self.exponent)
    }

    /// Element `index`, before it is rounded to a format.
    #[must_use]
    pub fn value(&self, index: u64) -> f32 {
        let bits = mix(mix(index as u32 ^ self.seed).wrapping_add(self.seed));
        // 24 bits in -1 .. 1, exactly.
        let unit = (bits >> 8) as f32 * (1.0 / (1 << 23) as f32) - 1.0;
        self.mean + self.scale() * unit
    }
}

impl RandomWeight {
    /// The handle of this weight with a backend's number `id`.
    pub(crate) fn handle(&self, id: usize) -> Weight {
        Weight {
            id,
            stack: self.stack,
            rows: self.rows,
            columns: self.columns,
            shard: self.place.shard,
        }
    }

    /// Elements of all matrices.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.stack * self.rows * self.columns
    }

    /// Fails for formats other than bf16 and f32: backends may round to f16 differently.
    pub(crate) fn check(&self, backend: &'static str) -> Result<(), BackendError> {
        match self.format {
            Format::BF16 | Format::F32 => Ok(()),
            other => Err(BackendError::Unsupported {
                backend,
                what: format!(
                    "{} of random numbers in {other}; it generates BF16 and F32",
                    self.name
                ),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_uniform_and_those_of_two_names_have_nothing_in_common() {
        let random = Random::named("a", 0, -2);
        let n = 100_000;
        let values: Vec<f64> = (0..n).map(|i| f64::from(random.value(i))).collect();
        assert!(values.iter().all(|x| (-0.25..0.25).contains(x)));
        let mean = values.iter().sum::<f64>() / n as f64;
        let variance = values.iter().map(|x| x * x).sum::<f64>() / n as f64;
        // Five standard errors.
        assert!(mean.abs() < 5.0 * 0.25 / (3.0 * n as f64).sqrt(), "{mean}");
        assert!((variance * 48.0 - 1.0).abs() < 0.02, "{variance}");
        for other in [
            Random::named("b", 0, -2),
            Random::named("a", 1, -2),
            random.part(1),
        ] {
            let product: f64 = (0..n)
                .map(|i| values[i as usize] * f64::from(other.value(i)))
                .sum::<f64>()
                / n as f64;
            assert!((product / variance).abs() < 0.02, "{product}");
        }
        let about = random.about(3.0);
        assert_eq!(about.value(7), 3.0 + random.value(7));
    }
}
