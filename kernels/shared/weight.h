// Weights as stored: vectors and small matrices keep their checkpoint's dtype and are widened where they are read.
#pragma once

// As `Format` of the host's side.
#define FORMAT_BF16 0
#define FORMAT_F16 1
#define FORMAT_F32 2

// f16 -> f32, exact, infinities and NaN included.
static __device__ __forceinline__ float widen_half(u16 bits) {
    u32 sign = (u32)(bits & 0x8000) << 16, rest = bits & 0x7fff;
    if (rest >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | rest << 13);
    // The exponent's bias moves by a product, which also handles what is subnormal.
    float magnitude = __uint_as_float(rest << 13) * 5.192296858534828e33f;  // 2^112
    return __uint_as_float(sign | __float_as_uint(magnitude));
}

// Element `i` of a weight, widened.
static __device__ __forceinline__ float weight_at(const void* weight, u32 format, u64 i) {
    if (format == FORMAT_F32) return ((const float*)weight)[i];
    u16 bits = ((const u16*)weight)[i];
    return format == FORMAT_BF16 ? __uint_as_float((u32)bits << 16) : widen_half(bits);
}
