// Weights as stored: plain elements or blocks, widened when they are read.
#pragma once
#include "shared/layout.h"
#include "shared/blocks.h"

// Element `i` of a weight, widened.
static __device__ __forceinline__ float weight_at(const void* weight, u32 format, u64 i) {
    if (format == FORMAT_F32) return ((const float*)weight)[i];
    if (format >= FIRST_OF_BLOCKS) return eight_of_blocks(weight, format, i / 8 * 8)[(u32)(i % 8)];
    u16 bits = ((const u16*)weight)[i];
    return format == FORMAT_BF16 ? __uint_as_float((u32)bits << 16) : widen_half(bits);
}

// `COUNT` elements (1, 2, 4 or 8) of a vector or of taps as they are stored, from `i` on, a multiple of COUNT: halves in the
// first words, f32 in all words. Rows of so few elements are never blocks. No branch depends on the format, so that many such
// loads can be in flight before the first is widened. A single half is read with its neighbour.
template <u32 COUNT>
static __device__ __forceinline__ void load_stored(u32 (&words)[COUNT], const void* weight, u32 format, u64 i) {
    bool wide = format == FORMAT_F32;
    const u8* at = (const u8*)weight + ((i << (wide ? 2 : 1)) & ~3ull);
    constexpr u32 HALF = (COUNT + 1) / 2;
#pragma unroll
    for (u32 n = 0; n < COUNT; n += COUNT > 2 ? 2 : 1) {
        if (COUNT > 2) {
            load_words(words[n], words[(n + 1) % COUNT], at + 4 * n, n < HALF || wide);
        } else {
            words[n] = load_word(at + 4 * n, n < HALF || wide);
        }
    }
}
// The same, widened: with a single branch on the format for all of them.
template <u32 COUNT>
static __device__ __forceinline__ void widen_stored(float (&x)[COUNT], const u32 (&words)[COUNT], u32 format, u64 i) {
    u32 first = COUNT == 1 && i % 2 != 0 ? 1 : 0;
    if (format == FORMAT_BF16) {
#pragma unroll
        for (u32 j = 0; j < COUNT; j++) x[j] = (first + j) % 2 ? high(words[j / 2]) : low(words[j / 2]);
    } else if (format == FORMAT_F16) {
#pragma unroll
        for (u32 j = 0; j < COUNT; j++) x[j] = widen_half((u16)(words[j / 2] >> (first + j) % 2 * 16));
    } else {
#pragma unroll
        for (u32 j = 0; j < COUNT; j++) x[j] = __uint_as_float(words[j]);
    }
}

// Eight elements of a row from `i` on, which is its column `column`; zeros from column `columns` on. One or two loads if rows
// are aligned to 16 bytes.
static __device__ __forceinline__ void weights_at(
    const void* weight, u32 format, u64 i, u32 columns, u32 column, float (&x)[8]) {
    if (columns % 8 != 0) {
#pragma unroll
        for (u32 j = 0; j < 8; j++) x[j] = column + j < columns ? weight_at(weight, format, i + j) : 0.0f;
    } else if (format >= FIRST_OF_BLOCKS) {
        Codes codes = eight_of_blocks(weight, format, i);
#pragma unroll
        for (u32 j = 0; j < 8; j++) x[j] = codes[j];
    } else if (format == FORMAT_F32) {
        float4 a = *(const float4*)((const float*)weight + i), b = *(const float4*)((const float*)weight + i + 4);
        x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    } else {
        uint4 words = *(const uint4*)((const u16*)weight + i);
        u32 pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (u32 j = 0; j < 8; j++) {
            u32 pair = pairs[j / 2];
            x[j] = format == FORMAT_F16 ? widen_half((u16)(j % 2 ? pair >> 16 : pair)) : j % 2 ? high(pair) : low(pair);
        }
    }
}

// Eight elements of a row. If BF16, the weight is bf16 with rows at multiples of 16 bytes: elements are kept as stored until
// they are used, so that many loads are in flight. Otherwise any format and width, widened when they are loaded.
template <bool BF16>
struct Eight {
    static constexpr u32 WORDS = BF16 ? 4 : 8;
    u32 words[WORDS];

    // From `i` on, which is column `column` of a row of `columns`; zeros past them.
    __device__ __forceinline__ void load(const void* weight, u32 format, u64 i, u32 columns, u32 column) {
        if (BF16) {
            uint4 four = *(const uint4*)((const u16*)weight + i);
            words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
        } else {
            float x[8];
            weights_at(weight, format, i, columns, column, x);
#pragma unroll
            for (u32 j = 0; j < 8; j++) words[j % WORDS] = __float_as_uint(x[j]);
        }
    }
    __device__ __forceinline__ float operator[](u32 j) const {
        if (!BF16) return __uint_as_float(words[j % WORDS]);
        return j % 2 ? high(words[j / 2]) : low(words[j / 2]);
    }
};
