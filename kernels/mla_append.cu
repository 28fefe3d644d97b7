// The latent cache's way in: normalise the latent, leave the shared key part as it is, append to the blocks. Twin of
// src/backend/cpu/mla_append.rs.
#include "shared/kernel.h"
#include "shared/batch.h"
#include "shared/weight.h"

// A block of 128 threads a token.
//   batch    the batch
//   input    [T, latent + rope] bf16
//   weight   [latent] of the format
//   latents  [blocks, block_tokens, latent + rope] bf16
extern "C" __global__ void __launch_bounds__(128) mla_append(
    const u32* batch, const bf16* input, const void* weight, u32 format, bf16* latents, u32 latent, u32 rope,
    u32 block_tokens, float eps) {
    SHARED(float, scratch, 32);
    u32 t = blockIdx.x;
    if (t >= batch[TOKENS]) return;
    u32 segment = owner(batch, t), width = latent + rope;
    u32 position = segment_word(batch, segment, POSITION) + t - segment_word(batch, segment, START);
    u32 block = batch[segment_word(batch, segment, BLOCKS) + position / block_tokens];
    bf16* output = latents + ((u64)block * block_tokens + position % block_tokens) * width;
    input += (u64)t * width;
    float squares = 0.0f;
    for (u32 i = threadIdx.x; i < latent; i += blockDim.x) {
        float x = widen(input[i]);
        squares += x * x;
    }
    float scale = 1.0f / sqrtf(block_sum(squares, scratch) / (float)latent + eps);
    for (u32 i = threadIdx.x; i < latent; i += blockDim.x) {
        output[i] = narrow(widen(input[i]) * scale * weight_at(weight, format, i));
    }
    for (u32 i = latent + threadIdx.x; i < width; i += blockDim.x) output[i] = input[i];
}
ENTRY(mla_append)
