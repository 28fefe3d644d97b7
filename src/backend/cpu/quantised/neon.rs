//! NEON, which every aarch64 machine has.

use std::arch::aarch64::{float32x4_t, int8x16_t, uint8x16_t};

use super::BLOCK;
use super::isa::Isa;

#[derive(Clone, Copy, Debug)]
pub(super) struct Neon(pulp::aarch64::Neon);

impl Neon {
    pub(super) fn detect() -> Option<Self> {
        pulp::aarch64::Neon::try_new().map(Self)
    }
}

impl Isa for Neon {
    type Lanes = [float32x4_t; 2];
    type Codes = [int8x16_t; 2];
    type Bytes = [uint8x16_t; 2];

    #[inline(always)]
    fn run<R>(self, f: impl FnOnce() -> R) -> R {
        f()
    }

    #[inline(always)]
    fn load(self, lanes: &[f32; 8]) -> [float32x4_t; 2] {
        bytemuck::cast(*lanes)
    }

    #[inline(always)]
    fn store(self, lanes: [float32x4_t; 2]) -> [f32; 8] {
        bytemuck::cast(lanes)
    }

    #[inline(always)]
    fn halves(self, halves: [f32; 2]) -> [float32x4_t; 2] {
        halves.map(|half| bytemuck::cast([half; 4]))
    }

    #[inline(always)]
    fn scale(self, lanes: [float32x4_t; 2], factor: f32) -> [float32x4_t; 2] {
        let neon = self.0.neon;
        lanes.map(|lanes| neon.vmulq_n_f32(lanes, factor))
    }

    #[inline(always)]
    fn mul_add(
        self,
        a: [float32x4_t; 2],
        b: [float32x4_t; 2],
        c: [float32x4_t; 2],
    ) -> [float32x4_t; 2] {
        let neon = self.0.neon;
        std::array::from_fn(|half| neon.vfmaq_f32(c[half], a[half], b[half]))
    }

    #[inline(always)]
    fn add(self, a: [float32x4_t; 2], b: [float32x4_t; 2]) -> [float32x4_t; 2] {
        let neon = self.0.neon;
        std::array::from_fn(|half| neon.vaddq_f32(a[half], b[half]))
    }

    #[inline(always)]
    fn codes(self, codes: &[i8; BLOCK]) -> [int8x16_t; 2] {
        bytemuck::cast(*codes)
    }

    /// A product of codes is at most 128 * 127, so that the sums of two are widened before they are made.
    #[inline(always)]
    fn dot(self, codes: [int8x16_t; 2], activations: &[i8; BLOCK]) -> [float32x4_t; 2] {
        let neon = self.0.neon;
        let activations: [int8x16_t; 2] = bytemuck::cast(*activations);
        std::array::from_fn(|half| {
            let (codes, activations) = (codes[half], activations[half]);
            let low = neon.vmull_s8(neon.vget_low_s8(codes), neon.vget_low_s8(activations));
            let high = neon.vmull_high_s8(codes, activations);
            neon.vcvtq_f32_s32(neon.vpaddq_s32(neon.vpaddlq_s16(low), neon.vpaddlq_s16(high)))
        })
    }

    #[inline(always)]
    fn bytes(self, bytes: &[u8; BLOCK]) -> [uint8x16_t; 2] {
        bytemuck::cast(*bytes)
    }

    #[inline(always)]
    fn nibbles(self, bytes: &[u8; 16]) -> [uint8x16_t; 2] {
        let neon = self.0.neon;
        let bytes: uint8x16_t = bytemuck::cast(*bytes);
        [
            neon.vandq_u8(bytes, bytemuck::cast([15_u8; 16])),
            neon.vshrq_n_u8::<4>(bytes),
        ]
    }

    #[inline(always)]
    fn shifted(self, bytes: [uint8x16_t; 2], by: usize, mask: u8) -> [uint8x16_t; 2] {
        let neon = self.0.neon;
        let by: int8x16_t = bytemuck::cast([-(by as i8); 16]);
        let mask = bytemuck::cast([mask; 16]);
        bytes.map(|bytes| neon.vandq_u8(neon.vshlq_u8(bytes, by), mask))
    }

    #[inline(always)]
    fn flagged(self, flags: [uint8x16_t; 2], masks: [uint8x16_t; 2], value: u8) -> [uint8x16_t; 2] {
        let neon = self.0.neon;
        let value = bytemuck::cast([value; 16]);
        std::array::from_fn(|half| neon.vandq_u8(neon.vtstq_u8(flags[half], masks[half]), value))
    }

    #[inline(always)]
    fn or(self, a: [uint8x16_t; 2], b: [uint8x16_t; 2]) -> [uint8x16_t; 2] {
        let neon = self.0.neon;
        std::array::from_fn(|half| neon.vorrq_u8(a[half], b[half]))
    }

    #[inline(always)]
    fn less(self, bytes: [uint8x16_t; 2], zero: u8) -> [i8; BLOCK] {
        let neon = self.0.neon;
        let zero = bytemuck::cast([zero; 16]);
        bytemuck::cast(bytes.map(|bytes| neon.vsubq_u8(bytes, zero)))
    }

    #[inline(always)]
    fn lookup(self, table: &[i8; 16], indices: [uint8x16_t; 2]) -> [i8; BLOCK] {
        let neon = self.0.neon;
        let table: int8x16_t = bytemuck::cast(*table);
        bytemuck::cast(indices.map(|indices| neon.vqtbl1q_s8(table, indices)))
    }
}
