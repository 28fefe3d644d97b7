//! Inputs from a small seeded generator, the same on every machine.
//!
//! It uses integer arithmetic and exactly rounded sums and products only: no logarithm or cosine of the platform's library
//! affects the bits of an input. It is for tests only.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// How the log decays of a case are distributed (`make_kda.py` has the same kinds).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gates {
    /// As in a freshly initialised model.
    Init,
    /// In (-5, 0).
    Bounded,
    /// Mostly moderate, with three in ten a reset to -1000.
    Masked,
    /// Near -1e-7 .. -1e-4: nothing is forgotten.
    Frozen,
    /// Log-uniform from 1e-4 to 2e2.
    Wild,
    /// Exactly 0.
    Zero,
    /// In (-7.4, -6): the sum of eight is above -60, so that the anchor is the chunk's middle, with which elements above the
    /// diagonal overflow.
    Steep,
}

impl Gates {
    /// Its name in the names of cases.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Init => "init",
            Self::Bounded => "bounded",
            Self::Masked => "masked",
            Self::Frozen => "frozen",
            Self::Wild => "wild",
            Self::Zero => "zero",
            Self::Steep => "steep",
        }
    }
}

/// The generator of one case.
pub struct Random(ChaCha8Rng);

impl Random {
    /// A generator whose numbers depend on `name` only.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self::seeded(name, 0)
    }

    /// A generator whose numbers depend on `name` and `seed`; those of seed 0 depend on `name` only.
    #[must_use]
    pub fn seeded(name: &str, seed: u64) -> Self {
        // FNV-1a.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Self(ChaCha8Rng::seed_from_u64(hash ^ seed))
    }

    /// Uniform in 0..n.
    pub fn below(&mut self, n: usize) -> usize {
        ((u64::from(self.0.next_u32()) * n as u64) >> 32) as usize
    }

    /// Uniform in (0, 1), exact in f32.
    pub fn uniform(&mut self) -> f32 {
        ((self.0.next_u32() >> 9) as f32 + 0.5) / (1 << 23) as f32
    }

    /// Approximately normal: the sum of twelve uniform numbers, minus its mean.
    pub fn normal(&mut self) -> f32 {
        let mut sum = 0;
        for _ in 0..6 {
            let bits = self.0.next_u32();
            sum += (bits >> 16) + (bits & 0xffff);
        }
        (f64::from(sum) / 65536.0 - 6.0) as f32
    }

    /// `n` approximately normal numbers times `scale`.
    pub fn normals(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| self.normal() * scale).collect()
    }

    /// `2^e (1 + m)` with e uniform in `low..high` and m in (0, 1): approximately log-uniform, and exact.
    pub fn octaves(&mut self, low: i32, high: i32) -> f32 {
        let exponent = low + self.below((high - low).unsigned_abs() as usize) as i32;
        f32::from_bits(((127 + exponent) as u32) << 23) * (1.0 + self.uniform())
    }

    /// Log decays for `tokens` tokens of `heads` heads of this `width`.
    pub fn gates(&mut self, kind: Gates, tokens: usize, heads: usize, width: usize) -> Vec<f32> {
        // As in a freshly initialised model: a rate per head, a step per channel.
        let rates: Vec<f32> = (0..heads).map(|_| 1.0 + 15.0 * self.uniform()).collect();
        let steps: Vec<f32> = (0..heads * width).map(|_| self.octaves(-10, -4)).collect();
        let mut gates = Vec::with_capacity(tokens * heads * width);
        for _ in 0..tokens {
            for channel in 0..heads * width {
                gates.push(match kind {
                    Gates::Init => -rates[channel / width] * steps[channel] * self.octaves(-2, 2),
                    Gates::Bounded => -5.0 * self.uniform(),
                    Gates::Masked if self.below(10) < 3 => -1000.0,
                    Gates::Masked => -0.5 * self.normal().abs(),
                    Gates::Frozen => -self.octaves(-24, -14),
                    Gates::Wild => -self.octaves(-13, 8),
                    Gates::Zero => 0.0,
                    Gates::Steep => -6.0 - 1.4 * self.uniform(),
                });
            }
        }
        gates
    }
}
