//! NEON, which every aarch64 CPU has.

use std::arch::aarch64::{float32x4_t, int8x16_t, int32x4_t, uint8x16_t};

use super::isa::Isa;
use super::scalar::half;

#[derive(Clone, Copy, Debug)]
pub(super) struct Neon(pulp::aarch64::Neon);

impl Neon {
    pub(super) fn detect() -> Option<Self> {
        pulp::aarch64::Neon::try_new().map(Self)
    }

    /// Sums of four products each. A product of codes is at most 128 * 127, so products are widened before two are added.
    #[inline(always)]
    fn products(self, codes: uint8x16_t, activations: uint8x16_t) -> int32x4_t {
        let neon = self.0.neon;
        let (codes, activations): (int8x16_t, int8x16_t) =
            (bytemuck::cast(codes), bytemuck::cast(activations));
        let low = neon.vmull_s8(neon.vget_low_s8(codes), neon.vget_low_s8(activations));
        let high = neon.vmull_high_s8(codes, activations);
        neon.vpaddq_s32(neon.vpaddlq_s16(low), neon.vpaddlq_s16(high))
    }

    /// Lane b: the sum of all of `blocks[b]`.
    #[inline(always)]
    fn sums_of_four(self, [a, b, c, d]: [int32x4_t; 4]) -> int32x4_t {
        let neon = self.0.neon;
        neon.vpaddq_s32(neon.vpaddq_s32(a, b), neon.vpaddq_s32(c, d))
    }
}

impl Isa for Neon {
    type Lanes = [float32x4_t; 2];
    type Ints = [int32x4_t; 2];
    type Bytes = [uint8x16_t; 2];
    type Partial = [int32x4_t; 2];

    #[inline(always)]
    fn run<R>(self, f: impl FnOnce() -> R) -> R {
        f()
    }

    #[inline(always)]
    fn splat(self, value: f32) -> [float32x4_t; 2] {
        bytemuck::cast([value; 8])
    }

    #[inline(always)]
    fn twice(self, four: &[f32; 4]) -> [float32x4_t; 2] {
        [bytemuck::cast(*four), bytemuck::cast(*four)]
    }

    #[inline(always)]
    fn mul(self, a: [float32x4_t; 2], b: [float32x4_t; 2]) -> [float32x4_t; 2] {
        let neon = self.0.neon;
        [neon.vmulq_f32(a[0], b[0]), neon.vmulq_f32(a[1], b[1])]
    }

    #[inline(always)]
    fn mul_add(
        self,
        a: [float32x4_t; 2],
        b: [float32x4_t; 2],
        c: [float32x4_t; 2],
    ) -> [float32x4_t; 2] {
        let neon = self.0.neon;
        [
            neon.vfmaq_f32(c[0], a[0], b[0]),
            neon.vfmaq_f32(c[1], a[1], b[1]),
        ]
    }

    #[inline(always)]
    fn add(self, a: [float32x4_t; 2], b: [float32x4_t; 2]) -> [float32x4_t; 2] {
        let neon = self.0.neon;
        [neon.vaddq_f32(a[0], b[0]), neon.vaddq_f32(a[1], b[1])]
    }

    #[inline(always)]
    fn halves(self, bits: [u16; 8]) -> [float32x4_t; 2] {
        bytemuck::cast(bits.map(half))
    }

    #[inline(always)]
    fn small(self, bytes: u64) -> [float32x4_t; 2] {
        bytemuck::cast(bytes.to_le_bytes().map(|byte| f32::from(byte as i8)))
    }

    #[inline(always)]
    fn load_ints(self, ints: &[i32; 8]) -> [int32x4_t; 2] {
        bytemuck::cast(*ints)
    }

    #[inline(always)]
    fn splat_ints(self, value: i32) -> [int32x4_t; 2] {
        bytemuck::cast([value; 8])
    }

    #[inline(always)]
    fn add_ints(self, a: [int32x4_t; 2], b: [int32x4_t; 2]) -> [int32x4_t; 2] {
        let neon = self.0.neon;
        [neon.vaddq_s32(a[0], b[0]), neon.vaddq_s32(a[1], b[1])]
    }

    #[inline(always)]
    fn sub_ints(self, a: [int32x4_t; 2], b: [int32x4_t; 2]) -> [int32x4_t; 2] {
        let neon = self.0.neon;
        [neon.vsubq_s32(a[0], b[0]), neon.vsubq_s32(a[1], b[1])]
    }

    #[inline(always)]
    fn shl_ints(self, ints: [int32x4_t; 2], by: u32) -> [int32x4_t; 2] {
        let neon = self.0.neon;
        let by: int32x4_t = bytemuck::cast([by; 4]);
        [neon.vshlq_s32(ints[0], by), neon.vshlq_s32(ints[1], by)]
    }

    #[inline(always)]
    fn to_lanes(self, ints: [int32x4_t; 2]) -> [float32x4_t; 2] {
        let neon = self.0.neon;
        [neon.vcvtq_f32_s32(ints[0]), neon.vcvtq_f32_s32(ints[1])]
    }

    #[inline(always)]
    fn partial(self) -> [int32x4_t; 2] {
        self.splat_ints(0)
    }

    #[inline(always)]
    fn unsigned(
        self,
        sums: [int32x4_t; 2],
        codes: [uint8x16_t; 2],
        activations: [uint8x16_t; 2],
    ) -> [int32x4_t; 2] {
        // Codes below 128 have the same value as signed bytes.
        self.add_ints(sums, self.signed(codes, activations))
    }

    #[inline(always)]
    fn total(self, sums: [int32x4_t; 2]) -> [int32x4_t; 2] {
        sums
    }

    #[inline(always)]
    fn signed(self, codes: [uint8x16_t; 2], activations: [uint8x16_t; 2]) -> [int32x4_t; 2] {
        [
            self.products(codes[0], activations[0]),
            self.products(codes[1], activations[1]),
        ]
    }

    #[inline(always)]
    fn sums(self, blocks: [[int32x4_t; 2]; 8]) -> [int32x4_t; 2] {
        let neon = self.0.neon;
        let [a, b, c, d, e, f, g, h] = blocks.map(|[low, high]| neon.vaddq_s32(low, high));
        [
            self.sums_of_four([a, b, c, d]),
            self.sums_of_four([e, f, g, h]),
        ]
    }

    #[inline(always)]
    fn sums_of_halves(self, [a, b, c, d]: [[int32x4_t; 2]; 4]) -> [int32x4_t; 2] {
        [
            self.sums_of_four([a[0], b[0], c[0], d[0]]),
            self.sums_of_four([a[1], b[1], c[1], d[1]]),
        ]
    }

    #[inline(always)]
    fn quads(self, quad: [i8; 4]) -> [uint8x16_t; 2] {
        bytemuck::cast([quad; 8])
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
    fn right(self, bytes: [uint8x16_t; 2], by: usize, mask: u8) -> [uint8x16_t; 2] {
        let neon = self.0.neon;
        let by: int8x16_t = bytemuck::cast([-(by as i8); 16]);
        let mask = bytemuck::cast([mask; 16]);
        bytes.map(|bytes| neon.vandq_u8(neon.vshlq_u8(bytes, by), mask))
    }

    #[inline(always)]
    fn left(self, bytes: [uint8x16_t; 2], by: usize, mask: u8) -> [uint8x16_t; 2] {
        let neon = self.0.neon;
        let by: int8x16_t = bytemuck::cast([by as i8; 16]);
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
        [neon.vorrq_u8(a[0], b[0]), neon.vorrq_u8(a[1], b[1])]
    }

    #[inline(always)]
    fn lookup(self, table: &[i8; 16], indices: [uint8x16_t; 2]) -> [uint8x16_t; 2] {
        let neon = self.0.neon;
        let table: uint8x16_t = bytemuck::cast(*table);
        indices.map(|indices| neon.vqtbl1q_u8(table, indices))
    }
}
