// The best of many scores, of equal scores the lower id: score and id as one word, the greatest of which is the best.
#pragma once

// f32 as an integer in the same order, then the lower id first. Never 0 for a number.
static __device__ __forceinline__ u64 ranked(float score, u32 id) {
    u32 bits = __float_as_uint(score);
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (u64)bits << 32 | (u32)~id;
}

static __device__ __forceinline__ u32 ranked_id(u64 rank) { return (u32)~rank; }

static __device__ __forceinline__ float ranked_score(u64 rank) {
    u32 bits = (u32)(rank >> 32);
    return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

// The greatest of a warp's words, in every lane: of the upper halves, then of the lower halves of words with that upper half.
static __device__ __forceinline__ u64 warp_best(u64 best) {
    u32 upper = __reduce_max_sync(EVERY_LANE, (u32)(best >> 32));
    u32 lower = __reduce_max_sync(EVERY_LANE, (u32)(best >> 32) == upper ? (u32)best : 0);
    return (u64)upper << 32 | lower;
}

// The greatest of a block's words; `scratch` is 32 words of shared memory, free again when this returns.
static __device__ __forceinline__ u64 block_best(u64 best, u64* scratch) {
    best = warp_best(best);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = best;
    __syncthreads();
    best = warp_best(threadIdx.x % 32 < blockDim.x / 32 ? scratch[threadIdx.x % 32] : 0);
    __syncthreads();
    return best;
}
