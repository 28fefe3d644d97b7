//! AVX2, and the two VNNI extensions in vectors of 256 bits.
//!
//! `vpmaddubsw` and `vpdpbusd` multiply unsigned bytes by signed ones, so that signed codes are passed as magnitudes, with
//! their signs moved to the activations. A magnitude is at most 128, an activation at most 127, so that the sum of two
//! products fits in the sixteen bits of `vpmaddubsw`.
//!
//! The only module of this backend with `unsafe`: for instructions that have no token in `pulp`'s dispatcher.
#![allow(unsafe_code)]

use std::arch::x86_64::{
    __m128, __m128i, __m256, __m256i, _mm256_cvtph_ps, _mm256_dpbusd_avx_epi32, _mm256_dpbusd_epi32,
};

use pulp::x86::V3;

use super::isa::Isa;

/// Products of bytes, which differ between the instruction sets here; all of them have AVX2, FMA and F16C.
trait Products: Copy {
    fn v3(self) -> V3;

    fn vectorised<R>(self, f: impl FnOnce() -> R) -> R;

    /// Adds products of unsigned and signed bytes.
    fn products(self, sums: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i;

    /// Sums of four products each.
    fn sums(self, sums: __m256i) -> __m256i;
}

impl<P: Products> Isa for P {
    type Lanes = __m256;
    type Ints = __m256i;
    type Bytes = __m256i;
    type Partial = __m256i;

    #[inline(always)]
    fn run<R>(self, f: impl FnOnce() -> R) -> R {
        self.vectorised(f)
    }

    #[inline(always)]
    fn splat(self, value: f32) -> __m256 {
        self.v3().avx._mm256_set1_ps(value)
    }

    #[inline(always)]
    fn twice(self, four: &[f32; 4]) -> __m256 {
        let four: __m128 = bytemuck::cast(*four);
        self.v3().avx._mm256_set_m128(four, four)
    }

    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        self.v3().avx._mm256_mul_ps(a, b)
    }

    #[inline(always)]
    fn mul_add(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        self.v3().fma._mm256_fmadd_ps(a, b, c)
    }

    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        self.v3().avx._mm256_add_ps(a, b)
    }

    #[inline(always)]
    fn halves(self, bits: [u16; 8]) -> __m256 {
        // SAFETY: every token here exists only where its `detect` found F16C.
        unsafe { _mm256_cvtph_ps(bytemuck::cast(bits)) }
    }

    #[inline(always)]
    fn small(self, bytes: u64) -> __m256 {
        let v3 = self.v3();
        let numbers = v3.sse2._mm_set_epi64x(0, bytes as i64);
        v3.avx
            ._mm256_cvtepi32_ps(v3.avx2._mm256_cvtepi8_epi32(numbers))
    }

    #[inline(always)]
    fn load_ints(self, ints: &[i32; 8]) -> __m256i {
        bytemuck::cast(*ints)
    }

    #[inline(always)]
    fn splat_ints(self, value: i32) -> __m256i {
        self.v3().avx._mm256_set1_epi32(value)
    }

    #[inline(always)]
    fn add_ints(self, a: __m256i, b: __m256i) -> __m256i {
        self.v3().avx2._mm256_add_epi32(a, b)
    }

    #[inline(always)]
    fn sub_ints(self, a: __m256i, b: __m256i) -> __m256i {
        self.v3().avx2._mm256_sub_epi32(a, b)
    }

    #[inline(always)]
    fn shl_ints(self, ints: __m256i, by: u32) -> __m256i {
        let v3 = self.v3();
        let by = v3.sse2._mm_cvtsi32_si128(by as i32);
        v3.avx2._mm256_sll_epi32(ints, by)
    }

    #[inline(always)]
    fn to_lanes(self, ints: __m256i) -> __m256 {
        self.v3().avx._mm256_cvtepi32_ps(ints)
    }

    #[inline(always)]
    fn partial(self) -> __m256i {
        self.v3().avx._mm256_setzero_si256()
    }

    #[inline(always)]
    fn unsigned(self, sums: __m256i, codes: __m256i, activations: __m256i) -> __m256i {
        self.products(sums, codes, activations)
    }

    #[inline(always)]
    fn total(self, sums: __m256i) -> __m256i {
        Products::sums(self, sums)
    }

    #[inline(always)]
    fn signed(self, codes: __m256i, activations: __m256i) -> __m256i {
        let avx2 = self.v3().avx2;
        let signed = avx2._mm256_sign_epi8(activations, codes);
        let sums = self.products(self.partial(), avx2._mm256_abs_epi8(codes), signed);
        Products::sums(self, sums)
    }

    #[inline(always)]
    fn sums(self, [a, b, c, d, e, f, g, h]: [__m256i; 8]) -> __m256i {
        let avx2 = self.v3().avx2;
        let (low, high) = (
            self.sums_of_halves([a, b, c, d]),
            self.sums_of_halves([e, f, g, h]),
        );
        avx2._mm256_add_epi32(
            avx2._mm256_permute2x128_si256::<0x20>(low, high),
            avx2._mm256_permute2x128_si256::<0x31>(low, high),
        )
    }

    #[inline(always)]
    fn sums_of_halves(self, [a, b, c, d]: [__m256i; 4]) -> __m256i {
        let avx2 = self.v3().avx2;
        let ab = avx2._mm256_add_epi32(
            avx2._mm256_unpacklo_epi32(a, b),
            avx2._mm256_unpackhi_epi32(a, b),
        );
        let cd = avx2._mm256_add_epi32(
            avx2._mm256_unpacklo_epi32(c, d),
            avx2._mm256_unpackhi_epi32(c, d),
        );
        avx2._mm256_add_epi32(
            avx2._mm256_unpacklo_epi64(ab, cd),
            avx2._mm256_unpackhi_epi64(ab, cd),
        )
    }

    #[inline(always)]
    fn quads(self, quad: [i8; 4]) -> __m256i {
        self.v3().avx._mm256_set1_epi32(bytemuck::cast(quad))
    }

    #[inline(always)]
    fn nibbles(self, bytes: &[u8; 16]) -> __m256i {
        let v3 = self.v3();
        let low: __m128i = bytemuck::cast(*bytes);
        let high = v3.sse2._mm_srli_epi16::<4>(low);
        let both = v3.avx._mm256_set_m128i(high, low);
        v3.avx2._mm256_and_si256(both, v3.avx._mm256_set1_epi8(15))
    }

    #[inline(always)]
    fn right(self, bytes: __m256i, by: usize, mask: u8) -> __m256i {
        let v3 = self.v3();
        let by = v3.sse2._mm_cvtsi32_si128(by as i32);
        let shifted = v3.avx2._mm256_srl_epi64(bytes, by);
        v3.avx2
            ._mm256_and_si256(shifted, v3.avx._mm256_set1_epi8(mask as i8))
    }

    #[inline(always)]
    fn left(self, bytes: __m256i, by: usize, mask: u8) -> __m256i {
        let v3 = self.v3();
        let by = v3.sse2._mm_cvtsi32_si128(by as i32);
        let shifted = v3.avx2._mm256_sll_epi64(bytes, by);
        v3.avx2
            ._mm256_and_si256(shifted, v3.avx._mm256_set1_epi8(mask as i8))
    }

    #[inline(always)]
    fn flagged(self, flags: __m256i, masks: __m256i, value: u8) -> __m256i {
        let v3 = self.v3();
        let found = v3.avx2._mm256_and_si256(flags, masks);
        let found = v3.avx2._mm256_cmpeq_epi8(found, masks);
        let value = v3.avx._mm256_set1_epi8(value as i8);
        v3.avx2._mm256_and_si256(found, value)
    }

    #[inline(always)]
    fn or(self, a: __m256i, b: __m256i) -> __m256i {
        self.v3().avx2._mm256_or_si256(a, b)
    }

    #[inline(always)]
    fn lookup(self, table: &[i8; 16], indices: __m256i) -> __m256i {
        let avx2 = self.v3().avx2;
        let table: __m128i = bytemuck::cast(*table);
        let table = avx2._mm256_broadcastsi128_si256(table);
        avx2._mm256_shuffle_epi8(table, indices)
    }

    #[inline(always)]
    fn transpose(self, [a, b, c, d, e, f, g, h]: [__m256i; 8]) -> [__m256i; 8] {
        let avx2 = self.v3().avx2;
        let low = four_columns(self.v3(), [a, b, c, d]);
        let high = four_columns(self.v3(), [e, f, g, h]);
        [
            avx2._mm256_permute2x128_si256::<0x20>(low[0], high[0]),
            avx2._mm256_permute2x128_si256::<0x20>(low[1], high[1]),
            avx2._mm256_permute2x128_si256::<0x20>(low[2], high[2]),
            avx2._mm256_permute2x128_si256::<0x20>(low[3], high[3]),
            avx2._mm256_permute2x128_si256::<0x31>(low[0], high[0]),
            avx2._mm256_permute2x128_si256::<0x31>(low[1], high[1]),
            avx2._mm256_permute2x128_si256::<0x31>(low[2], high[2]),
            avx2._mm256_permute2x128_si256::<0x31>(low[3], high[3]),
        ]
    }
}

/// Vector i has columns i and i + 4 of four rows in its halves, four bytes at a time.
#[inline(always)]
fn four_columns(v3: V3, [a, b, c, d]: [__m256i; 4]) -> [__m256i; 4] {
    let avx2 = v3.avx2;
    let low = [
        avx2._mm256_unpacklo_epi32(a, b),
        avx2._mm256_unpacklo_epi32(c, d),
    ];
    let high = [
        avx2._mm256_unpackhi_epi32(a, b),
        avx2._mm256_unpackhi_epi32(c, d),
    ];
    [
        avx2._mm256_unpacklo_epi64(low[0], low[1]),
        avx2._mm256_unpackhi_epi64(low[0], low[1]),
        avx2._mm256_unpacklo_epi64(high[0], high[1]),
        avx2._mm256_unpackhi_epi64(high[0], high[1]),
    ]
}

/// AVX2 with FMA and F16C.
#[derive(Clone, Copy, Debug)]
pub(super) struct Avx2(V3);

impl Avx2 {
    pub(super) fn detect() -> Option<Self> {
        let v3 = V3::try_new()?;
        is_x86_feature_detected!("f16c").then_some(Self(v3))
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn with_avx2<R>(f: impl FnOnce() -> R) -> R {
    f()
}

impl Products for Avx2 {
    #[inline(always)]
    fn v3(self) -> V3 {
        self.0
    }

    #[inline(always)]
    fn vectorised<R>(self, f: impl FnOnce() -> R) -> R {
        // SAFETY: the token exists only where `detect` found all three features.
        unsafe { with_avx2(f) }
    }

    #[inline(always)]
    fn products(self, sums: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i {
        let avx2 = self.0.avx2;
        avx2._mm256_add_epi16(sums, avx2._mm256_maddubs_epi16(unsigned, signed))
    }

    #[inline(always)]
    fn sums(self, sums: __m256i) -> __m256i {
        let ones = self.0.avx._mm256_set1_epi16(1);
        self.0.avx2._mm256_madd_epi16(sums, ones)
    }
}

/// AVX2 with AVX-VNNI.
#[derive(Clone, Copy, Debug)]
pub(super) struct AvxVnni(V3);

impl AvxVnni {
    pub(super) fn detect() -> Option<Self> {
        let v3 = V3::try_new()?;
        let found = is_x86_feature_detected!("avxvnni") && is_x86_feature_detected!("f16c");
        found.then_some(Self(v3))
    }
}

#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
fn with_avx_vnni<R>(f: impl FnOnce() -> R) -> R {
    f()
}

impl Products for AvxVnni {
    #[inline(always)]
    fn v3(self) -> V3 {
        self.0
    }

    #[inline(always)]
    fn vectorised<R>(self, f: impl FnOnce() -> R) -> R {
        // SAFETY: the token exists only where `detect` found all four features.
        unsafe { with_avx_vnni(f) }
    }

    #[inline(always)]
    fn products(self, sums: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i {
        // SAFETY: the token exists only where `detect` found AVX-VNNI.
        unsafe { _mm256_dpbusd_avx_epi32(sums, unsigned, signed) }
    }

    #[inline(always)]
    fn sums(self, sums: __m256i) -> __m256i {
        sums
    }
}

/// AVX-512 VNNI in vectors of 256 bits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Avx512Vnni(V3);

impl Avx512Vnni {
    pub(super) fn detect() -> Option<Self> {
        let v3 = V3::try_new()?;
        let found = is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("f16c");
        found.then_some(Self(v3))
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512vnni,avx512vl")]
fn with_avx512_vnni<R>(f: impl FnOnce() -> R) -> R {
    f()
}

impl Products for Avx512Vnni {
    #[inline(always)]
    fn v3(self) -> V3 {
        self.0
    }

    #[inline(always)]
    fn vectorised<R>(self, f: impl FnOnce() -> R) -> R {
        // SAFETY: the token exists only where `detect` found all five features.
        unsafe { with_avx512_vnni(f) }
    }

    #[inline(always)]
    fn products(self, sums: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i {
        // SAFETY: the token exists only where `detect` found AVX-512 VNNI and its vectors of 256 bits.
        unsafe { _mm256_dpbusd_epi32(sums, unsigned, signed) }
    }

    #[inline(always)]
    fn sums(self, sums: __m256i) -> __m256i {
        sums
    }
}
