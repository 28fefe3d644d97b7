// The dtypes of a latent cache: bf16, f16 or f32, and how an element is written and read.
//
// Tensor cores multiply bf16 here, so that cached numbers of the other types are rounded to it when they become operands: the
// additional precision of their pools is for the scores of a trace and for caches that are transferred, not for products.
#pragma once
#include "shared/weight.h"

// IEEE half precision.
struct f16 {
    u16 bits;
};

static __device__ __forceinline__ float widen(f16 x) { return widen_half(x.bits); }
static __device__ __forceinline__ float widen(float x) { return x; }

// The id of an element type among formats.
template <typename Latent>
static __device__ __forceinline__ constexpr u32 format_of();
template <>
__device__ __forceinline__ constexpr u32 format_of<bf16>() { return FORMAT_BF16; }
template <>
__device__ __forceinline__ constexpr u32 format_of<f16>() { return FORMAT_F16; }
template <>
__device__ __forceinline__ constexpr u32 format_of<float>() { return FORMAT_F32; }

// Writes to the cache: to nearest, ties to even.
static __device__ __forceinline__ void store_latent(bf16& to, float x) { to = narrow(x); }
static __device__ __forceinline__ void store_latent(f16& to, float x) { to.bits = (u16)narrow_pair_f16(x, 0.0f); }
static __device__ __forceinline__ void store_latent(float& to, float x) { to = x; }

// Reads from the cache, as an operand.
static __device__ __forceinline__ bf16 operand(bf16 x) { return x; }
template <typename Latent>
static __device__ __forceinline__ bf16 operand(Latent x) { return narrow(widen(x)); }

// Eight elements at a multiple of sixteen bytes, as operands.
template <typename Latent>
static __device__ __forceinline__ uint4 eight_operands(const Latent* from) {
    if (format_of<Latent>() == FORMAT_BF16) return *(const uint4*)from;
    float x[8];
    weights_at(from, format_of<Latent>(), 0, 8, 0, x);
    return make_uint4(narrow_pair(x[0], x[1]), narrow_pair(x[2], x[3]), narrow_pair(x[4], x[5]), narrow_pair(x[6], x[7]));
}
