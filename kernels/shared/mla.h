// What both forms of latent attention share: widths, and where a position's row is cached.
#pragma once

#include "batch.h"

// The first score of a running maximum: below all others, yet a number.
#define LOWEST -3.0e38f

// The widths of one attention.
struct Attention {
    u32 heads, latent, nope, rope, value, block_tokens;
};

// The cached row [latent | rope] at `position` of a segment's sequence. A million tokens fill more than 32 bits of offset.
template <typename Latent>
static __device__ __forceinline__ const Latent* latent_row(
    const Attention& a, const Latent* latents, const u32* table, u32 position) {
    u32 block = table[position / a.block_tokens];
    return latents + ((u64)block * a.block_tokens + position % a.block_tokens) * (a.latent + a.rope);
}

// What scores are multiplied with.
static __device__ __forceinline__ float score_scale(const Attention& a) { return 1.0f / sqrtf((float)(a.nope + a.rope)); }
