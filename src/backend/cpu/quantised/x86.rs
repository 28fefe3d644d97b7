//! AVX2, and the two VNNI extensions in vectors of 256 bits.
//!
//! Weights' codes go in as magnitudes, with their signs moved to the activations: `vpmaddubsw` and `vpdpbusd` multiply
//! unsigned bytes by signed ones. A magnitude is at most 128, an activation at most 127, so that two products fit in the
//! sixteen bits of `vpmaddubsw`.
//!
//! The one module of this backend with `unsafe`: what the dispatcher of `pulp` has no token for.
#![allow(unsafe_code)]

use std::arch::x86_64::{__m128i, __m256, __m256i, _mm256_dpbusd_avx_epi32, _mm256_dpbusd_epi32};

use pulp::x86::V3;

use super::BLOCK;
use super::isa::Isa;

/// The magnitudes of 32 codes, and the codes for their signs.
#[derive(Clone, Copy)]
pub(super) struct Signed {
    magnitudes: __m256i,
    codes: __m256i,
}

/// `dot` of integers: what the instruction sets here differ in.
trait Products: Copy {
    fn v3(self) -> V3;

    fn vectorised<R>(self, f: impl FnOnce() -> R) -> R;

    /// The sums of four products each of unsigned and signed bytes.
    fn products(self, unsigned: __m256i, signed: __m256i) -> __m256i;
}

impl<P: Products> Isa for P {
    type Lanes = __m256;
    type Codes = Signed;
    type Bytes = __m256i;

    #[inline(always)]
    fn run<R>(self, f: impl FnOnce() -> R) -> R {
        self.vectorised(f)
    }

    #[inline(always)]
    fn load(self, lanes: &[f32; 8]) -> __m256 {
        bytemuck::cast(*lanes)
    }

    #[inline(always)]
    fn store(self, lanes: __m256) -> [f32; 8] {
        bytemuck::cast(lanes)
    }

    #[inline(always)]
    fn halves(self, halves: [f32; 2]) -> __m256 {
        // Both numbers in every pair of lanes, from one load, then one of them.
        let avx = self.v3().avx;
        let pairs = avx._mm256_set1_pd(f64::from_bits(bytemuck::cast(halves)));
        let which = bytemuck::cast([0, 0, 0, 0, 1, 1, 1, 1_i32]);
        avx._mm256_permutevar_ps(avx._mm256_castpd_ps(pairs), which)
    }

    #[inline(always)]
    fn scale(self, lanes: __m256, factor: f32) -> __m256 {
        let avx = self.v3().avx;
        avx._mm256_mul_ps(lanes, avx._mm256_set1_ps(factor))
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
    fn codes(self, codes: &[i8; BLOCK]) -> Signed {
        let codes = bytemuck::cast(*codes);
        let magnitudes = self.v3().avx2._mm256_abs_epi8(codes);
        Signed { magnitudes, codes }
    }

    #[inline(always)]
    fn dot(self, codes: Signed, activations: &[i8; BLOCK]) -> __m256 {
        let v3 = self.v3();
        let activations: __m256i = bytemuck::cast(*activations);
        let signed = v3.avx2._mm256_sign_epi8(activations, codes.codes);
        let sums = self.products(codes.magnitudes, signed);
        v3.avx._mm256_cvtepi32_ps(sums)
    }

    #[inline(always)]
    fn bytes(self, bytes: &[u8; BLOCK]) -> __m256i {
        bytemuck::cast(*bytes)
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
    fn shifted(self, bytes: __m256i, by: usize, mask: u8) -> __m256i {
        let v3 = self.v3();
        let by = v3.sse2._mm_cvtsi32_si128(by as i32);
        let shifted = v3.avx2._mm256_srl_epi64(bytes, by);
        let mask = v3.avx._mm256_set1_epi8(mask as i8);
        v3.avx2._mm256_and_si256(shifted, mask)
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
    fn less(self, bytes: __m256i, zero: u8) -> [i8; BLOCK] {
        let v3 = self.v3();
        let zero = v3.avx._mm256_set1_epi8(zero as i8);
        bytemuck::cast(v3.avx2._mm256_sub_epi8(bytes, zero))
    }

    #[inline(always)]
    fn lookup(self, table: &[i8; 16], indices: __m256i) -> [i8; BLOCK] {
        let avx2 = self.v3().avx2;
        let table: __m128i = bytemuck::cast(*table);
        let table = avx2._mm256_broadcastsi128_si256(table);
        bytemuck::cast(avx2._mm256_shuffle_epi8(table, indices))
    }
}

/// AVX2 with FMA.
#[derive(Clone, Copy, Debug)]
pub(super) struct Avx2(V3);

impl Avx2 {
    pub(super) fn detect() -> Option<Self> {
        V3::try_new().map(Self)
    }
}

impl Products for Avx2 {
    #[inline(always)]
    fn v3(self) -> V3 {
        self.0
    }

    #[inline(always)]
    fn vectorised<R>(self, f: impl FnOnce() -> R) -> R {
        struct Call<F>(F);
        impl<R, F: FnOnce() -> R> pulp::NullaryFnOnce for Call<F> {
            type Output = R;

            #[inline(always)]
            fn call(self) -> R {
                (self.0)()
            }
        }
        self.0.vectorize(Call(f))
    }

    #[inline(always)]
    fn products(self, unsigned: __m256i, signed: __m256i) -> __m256i {
        let avx2 = self.0.avx2;
        let pairs = avx2._mm256_maddubs_epi16(unsigned, signed);
        avx2._mm256_madd_epi16(pairs, self.0.avx._mm256_set1_epi16(1))
    }
}

/// AVX2 with AVX-VNNI.
#[derive(Clone, Copy, Debug)]
pub(super) struct AvxVnni(V3);

impl AvxVnni {
    pub(super) fn detect() -> Option<Self> {
        let v3 = V3::try_new()?;
        is_x86_feature_detected!("avxvnni").then_some(Self(v3))
    }
}

#[target_feature(enable = "avx2,fma,avxvnni")]
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
        // SAFETY: the token exists only where `detect` found all three features.
        unsafe { with_avx_vnni(f) }
    }

    #[inline(always)]
    fn products(self, unsigned: __m256i, signed: __m256i) -> __m256i {
        let zero = self.0.avx._mm256_setzero_si256();
        // SAFETY: the token exists only where `detect` found AVX-VNNI.
        unsafe { _mm256_dpbusd_avx_epi32(zero, unsigned, signed) }
    }
}

/// AVX-512 VNNI in vectors of 256 bits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Avx512Vnni(V3);

impl Avx512Vnni {
    pub(super) fn detect() -> Option<Self> {
        let v3 = V3::try_new()?;
        let found = is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512vl");
        found.then_some(Self(v3))
    }
}

#[target_feature(enable = "avx2,fma,avx512vnni,avx512vl")]
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
        // SAFETY: the token exists only where `detect` found all four features.
        unsafe { with_avx512_vnni(f) }
    }

    #[inline(always)]
    fn products(self, unsigned: __m256i, signed: __m256i) -> __m256i {
        let zero = self.0.avx._mm256_setzero_si256();
        // SAFETY: the token exists only where `detect` found AVX-512 VNNI and its vectors of 256 bits.
        unsafe { _mm256_dpbusd_epi32(zero, unsigned, signed) }
    }
}
