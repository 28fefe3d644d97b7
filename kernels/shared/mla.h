// Definitions for both forms of latent attention: widths, and the address of a position's cached row.
#pragma once

#include "batch.h"

// The initial value of a running maximum: less than every score, but finite.
#define LOWEST -3.0e38f

// The widths of one attention.
struct Attention {
    u32 heads, latent, nope, rope, value, block_tokens;
};

// The cached row [latent | rope] at `position` of a segment's sequence. A million tokens need offsets of more than 32 bits.
template <typename Latent>
static __device__ __forceinline__ const Latent* latent_row(
    const Attention& a, const Latent* latents, const u32* table, u32 position) {
    u32 block = table[position / a.block_tokens];
    return latents + ((u64)block * a.block_tokens + position % a.block_tokens) * (a.latent + a.rope);
}

// The factor of scores.
static __device__ __forceinline__ float score_scale(const Attention& a) { return 1.0f / sqrtf((float)(a.nope + a.rope)); }
