// Eight elements of a row in one or two loads. Properties that are known before a loop (a weight's format, whether rows are a
// multiple of eight) are template parameters: with a branch in the loop each load would wait for the one before.
#pragma once
#include "weight.h"

// Eight elements of a row, of which `at` points to column `k`, the first; zeros for columns past the last. WHOLE: rows have a
// multiple of eight columns, aligned to 16 bytes.
template <bool WHOLE>
static __device__ __forceinline__ uint4 eight_of(const bf16* at, u32 k, u32 columns) {
    if constexpr (WHOLE) {
        return *(const uint4*)at;
    } else {
        u32 pairs[4];
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 c = 2 * i;
            pairs[i] = pair_of(k + c < columns ? at[c] : bf16{0}, k + c + 1 < columns ? at[c + 1] : bf16{0});
        }
        return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
}

// Eight elements as stored in a weight of this format, aligned to 16 bytes.
template <u32 FORMAT>
struct Stored {
    static constexpr u32 WORDS = FORMAT == FORMAT_F32 ? 2 : 1;
    uint4 words[WORDS];

    // Those from element `i` on; zeros if not `there`.
    __device__ __forceinline__ void load(const void* weight, u64 i, bool there) {
        const u8* from = (const u8*)weight + i * (FORMAT == FORMAT_F32 ? 4 : 2);
#pragma unroll
        for (u32 n = 0; n < WORDS; n++) words[n] = load_sixteen(from + 16 * n, there);
    }

    // Element `j`, widened.
    __device__ __forceinline__ float at(u32 j) const {
        const uint4& four = words[FORMAT == FORMAT_F32 ? j / 4 : 0];
        u32 n = FORMAT == FORMAT_F32 ? j % 4 : j / 2;
        u32 word = n == 0 ? four.x : n == 1 ? four.y : n == 2 ? four.z : four.w;
        if (FORMAT == FORMAT_F32) return __uint_as_float(word);
        if (FORMAT == FORMAT_F16) return widen_half((u16)(j % 2 ? word >> 16 : word));
        return j % 2 ? high(word) : low(word);
    }
};
