// Weights in blocks, as in files: integer codes with scales, widened to the values of src/checkpoint/blocks, which defines
// each format's bytes. Blocks follow each other without padding and begin at any byte; a buffer ends at a multiple of 16
// bytes.
//
// A scale (an f16 times an integer of at most 8 bits), its product with a code, and a minimum have at most 24 bits each, so
// all of them are exact in f32, and only the sum with the minimum rounds: fused or not, the bits are those of the CPU.
#pragma once
#include "shared/layout.h"

// In the layout, formats in blocks come after plain dtypes, and those with blocks of 256 elements last.
#define FIRST_OF_BLOCKS FORMAT_Q8_0
#define FIRST_OF_256 FORMAT_Q2_K

// f16 -> f32, exact, infinities and NaN included.
static __device__ __forceinline__ float widen_half(u16 bits) {
    u32 sign = (u32)(bits & 0x8000) << 16, rest = bits & 0x7fff;
    if (rest >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | rest << 13);
    // The exponent's bias is changed by a product, which also handles subnormal numbers.
    float magnitude = __uint_as_float(rest << 13) * 5.192296858534828e33f;  // 2^112
    return __uint_as_float(sign | __float_as_uint(magnitude));
}

// Eight elements: `scale * (code - zero) + minimum`, one code per byte. Symmetric formats add -0, which changes nothing.
struct Codes {
    u32 low, high;
    int zero;
    float scale, minimum = -0.0f;

    __device__ __forceinline__ float operator[](u32 j) const {
        int code = (int)((j < 4 ? low : high) >> 8 * (j % 4) & 255);
        return scale * (float)(code - zero) + minimum;
    }
};

// Four bytes from any address on, from the aligned words that contain them.
static __device__ __forceinline__ u32 word_from(const u8* at) {
    u32 shift = 8 * (u32)((u64)at % 4);
    u32 low = *(const u32*)(at - (u64)at % 4) >> shift;
    const u8* last = at + 3;
    return shift == 0 ? low : low | *(const u32*)(last - (u64)last % 4) << (32 - shift);
}
static __device__ __forceinline__ float half_from(const u8* at) { return widen_half((u16)(at[0] | at[1] << 8)); }

// Bits `shift ..` of eight bytes, those of `mask` (the same byte four times).
static __device__ __forceinline__ uint2 fields(const u8* at, u32 shift, u32 mask) {
    return make_uint2(word_from(at) >> shift & mask, word_from(at + 4) >> shift & mask);
}
// Four bits, each in a byte of its own.
static __device__ __forceinline__ u32 spread(u32 bits) { return (bits | bits << 7 | bits << 14 | bits << 21) & 0x01010101u; }

// Entries of a table of 16 signed bytes, eight in each of two words; as codes around 128.
static __device__ __forceinline__ u32 look_up(u32 codes, u64 first, u64 second) {
    u32 found = 0;
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
        u32 code = codes >> 8 * j & 15;
        found |= (u32)((code < 8 ? first : second) >> 8 * (code % 8) & 255) << 8 * j;
    }
    return found ^ 0x80808080u;
}

// Element j of 32 in the low four bits of byte j, element j + 16 in the high ones: eight from element `i` on.
static __device__ __forceinline__ uint2 nibbles_of_32(const u8* at, u32 i) { return fields(at + i % 16, i / 16 * 4, 0x0f0f0f0fu); }

// Four bits that index a table: the 16 values of the IQ4 formats, or twice the four-bit floats of MXFP4.
static __device__ __forceinline__ Codes codes_of_iq4(uint2 codes, float scale) {
    const u64 first = 0xf6eaddcfbfad9881ull, second = 0x7159453526190d01ull;
    return {look_up(codes.x, first, second), look_up(codes.y, first, second), 128, scale};
}
static __device__ __forceinline__ Codes codes_of_e2m1(uint2 codes, float scale) {
    const u64 first = 0x0c08060403020100ull, second = 0xf4f8fafcfdfeff00ull;
    return {look_up(codes.x, first, second), look_up(codes.y, first, second), 128, scale};
}

// 2^(e - 128): half of the power of two with the biased exponent `e`.
static __device__ __forceinline__ float half_power(u32 e) {
    return __uint_as_float(e == 0 ? 0x00200000u : e == 1 ? 0x00400000u : (e - 1) << 23);
}

// Eight elements from `i` on of a block of 32, or of 64.
static __device__ __forceinline__ Codes eight_of_32_or_64(const u8* at, u32 format, u32 i) {
    uint2 codes;
    switch (format) {
        case FORMAT_Q4_0:
            codes = nibbles_of_32(at + 2, i);
            return {codes.x, codes.y, 8, half_from(at)};
        case FORMAT_Q4_1:
            codes = nibbles_of_32(at + 4, i);
            return {codes.x, codes.y, 0, half_from(at), half_from(at + 2)};
        case FORMAT_Q4_1_64:
            codes = nibbles_of_32(at + 4 + i / 32 * 16, i % 32);
            return {codes.x, codes.y, 0, half_from(at), half_from(at + 2)};
        case FORMAT_Q5_0: {
            codes = nibbles_of_32(at + 6, i);
            u32 fifth = at[2 + i / 8];
            return {codes.x | spread(fifth & 15) << 4, codes.y | spread(fifth >> 4) << 4, 16, half_from(at)};
        }
        case FORMAT_Q5_1: {
            codes = nibbles_of_32(at + 8, i);
            u32 fifth = at[4 + i / 8];
            return {codes.x | spread(fifth & 15) << 4, codes.y | spread(fifth >> 4) << 4, 0, half_from(at), half_from(at + 2)};
        }
        case FORMAT_IQ4_NL: return codes_of_iq4(nibbles_of_32(at + 2, i), half_from(at));
        case FORMAT_MXFP4: return codes_of_e2m1(nibbles_of_32(at + 1, i), half_power(at[0]));
        default:  // FORMAT_Q8_0
            return {word_from(at + 2 + i) ^ 0x80808080u, word_from(at + 6 + i) ^ 0x80808080u, 128, half_from(at)};
    }
}

// Two bits per element, four elements that are 32 apart in a byte; four bits, two of them; one bit, eight of them.
static __device__ __forceinline__ uint2 two_bits(const u8* at, u32 i) {
    return fields(at + 32 * (i / 128) + i % 32, i % 128 / 32 * 2, 0x03030303u);
}
static __device__ __forceinline__ uint2 four_bits(const u8* at, u32 i) {
    return fields(at + 32 * (i / 64) + i % 32, i % 64 / 32 * 4, 0x0f0f0f0fu);
}
static __device__ __forceinline__ uint2 one_bit(const u8* at, u32 i) { return fields(at + i % 32, i / 32, 0x01010101u); }

// Codes of Q4_K and Q5_K: two f16, then eight pairs of six bits in twelve bytes, scale and minimum of 32.
static __device__ __forceinline__ Codes by_six_bits(const u8* at, u32 group, uint2 codes) {
    const u8* packed = at + 4 + group;
    u32 scale = packed[0] & 63, minimum = packed[4] & 63;
    if (group >= 4) {
        scale = (packed[4] & 15) | packed[-4] >> 6 << 4;
        minimum = packed[4] >> 4 | packed[0] >> 6 << 4;
    }
    return {codes.x, codes.y, 0, half_from(at) * (float)scale, -(half_from(at + 2) * (float)minimum)};
}

// Eight elements from `i` on of a block of 256.
static __device__ __forceinline__ Codes eight_of_256(const u8* at, u32 format, u32 i) {
    u32 group = i / 32;
    uint2 codes, more;
    switch (format) {
        case FORMAT_Q2_K: {
            u32 packed = at[i / 16];
            codes = two_bits(at + 16, i);
            return {codes.x, codes.y, 0, half_from(at + 80) * (float)(packed & 15), -(half_from(at + 82) * (float)(packed >> 4))};
        }
        case FORMAT_Q3_K: {
            u32 of_16 = i / 16;
            u32 low = at[96 + of_16 % 8] >> of_16 / 8 * 4 & 15, top = at[104 + of_16 % 4] >> of_16 / 4 * 2 & 3;
            // The third bit adds four if it is set, and the zero point is four.
            codes = two_bits(at + 32, i), more = one_bit(at, i);
            return {codes.x | more.x << 2, codes.y | more.y << 2, 4, half_from(at + 108) * (float)((int)(low | top << 4) - 32)};
        }
        case FORMAT_Q4_K: return by_six_bits(at, group, four_bits(at + 16, i));
        case FORMAT_Q5_K:
            codes = four_bits(at + 48, i), more = one_bit(at + 16, i);
            return by_six_bits(at, group, make_uint2(codes.x | more.x << 4, codes.y | more.y << 4));
        case FORMAT_IQ4_XS: {
            u32 low = at[4 + group / 2] >> group % 2 * 4 & 15, top = (u32)(at[2] | at[3] << 8) >> 2 * group & 3;
            return codes_of_iq4(
                nibbles_of_32(at + 8 + 16 * group, i % 32), half_from(at) * (float)((int)(low | top << 4) - 32));
        }
        default: {  // FORMAT_Q6_K
            u32 half = i / 128, quarter = group % 4;
            codes = fields(at + 64 * half + 32 * (quarter & 1) + i % 32, quarter / 2 * 4, 0x0f0f0f0fu);
            more = fields(at + 128 + 32 * half + i % 32, 2 * quarter, 0x03030303u);
            int scale = (signed char)at[192 + i / 16];
            return {codes.x | more.x << 4, codes.y | more.y << 4, 32, half_from(at + 208) * (float)scale};
        }
    }
}

// Bytes per block.
static __device__ __forceinline__ u32 block_bytes(u32 format) {
    switch (format) {
        case FORMAT_MXFP4: return 17;
        case FORMAT_Q4_0:
        case FORMAT_IQ4_NL: return 18;
        case FORMAT_Q4_1: return 20;
        case FORMAT_Q5_0: return 22;
        case FORMAT_Q4_1_64: return 36;
        case FORMAT_Q5_1: return 24;
        case FORMAT_Q8_0: return 34;
        case FORMAT_Q2_K: return 84;
        case FORMAT_Q3_K: return 110;
        case FORMAT_IQ4_XS: return 136;
        case FORMAT_Q4_K: return 144;
        case FORMAT_Q5_K: return 176;
        default: return 210;  // FORMAT_Q6_K
    }
}

// Eight elements of a weight in blocks from `i` on, a multiple of eight. Rows are whole blocks, so block indices count
// through all rows.
static __device__ __forceinline__ Codes eight_of_blocks(const void* weight, u32 format, u64 i) {
    const u8* blocks = (const u8*)weight;
    u32 bytes = block_bytes(format);
    if (format >= FIRST_OF_256) return eight_of_256(blocks + i / 256 * bytes, format, (u32)(i % 256));
    u32 length = format == FORMAT_Q4_1_64 ? 64 : 32;
    return eight_of_32_or_64(blocks + i / length * bytes, format, (u32)(i % length));
}
