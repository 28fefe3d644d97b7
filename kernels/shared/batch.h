// The batch of one submission, as laid out in `src/backend/gpu/batch_metadata.rs`: a list of words on the device. A header,
// then lists; the header has the offset of each list. Segments of several tokens come first in the lists of rows, chunks,
// tiles and windows, then those of a single token.
//
// Grids may be larger than the batch, so that one CUDA graph can be reused: a block beyond the last one returns.
#pragma once
#include "shared/layout.h"

// Word `field` of segment `segment`.
static __device__ __forceinline__ u32 segment_word(const u32* batch, u32 segment, u32 field) {
    return batch[batch[AT_SEGMENTS] + segment * SEGMENT + field];
}

// At most 32 consecutive words that a warp reads at the same time, one per lane. Every lane must call it for each word.
struct Words {
    u32 own;
    __device__ __forceinline__ u32 operator[](u32 i) const { return __shfl_sync(EVERY_LANE, own, (int)i); }
};
static __device__ __forceinline__ Words words_at(const u32* at, u32 count) { return Words{at[min(threadIdx.x % 32, count - 1)]}; }

// The segment of row `row`.
static __device__ __forceinline__ u32 owner(const u32* batch, u32 row) { return batch[batch[AT_OWNERS] + row]; }
