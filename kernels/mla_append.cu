// Writes to the latent cache: normalises the latent, copies the shared key part, and appends both to the sequence's blocks.
// Counterpart of src/backend/cpu/mla_append.rs.
#include "shared/kernel.h"
#include "shared/batch.h"
#include "shared/latents.h"

template <typename Latent>
static __device__ __forceinline__ void append(
    const u32* batch, const bf16* input, const void* weight, u32 format, Latent* latents, u32 latent, u32 rope,
    u32 block_tokens, float eps, float* scratch) {
    u32 t = blockIdx.x;
    if (t >= batch[TOKENS]) return;
    u32 segment = owner(batch, t), width = latent + rope;
    u32 position = segment_word(batch, segment, POSITION) + t - segment_word(batch, segment, START);
    u32 block = batch[segment_word(batch, segment, BLOCKS) + position / block_tokens];
    Latent* output = latents + ((u64)block * block_tokens + position % block_tokens) * width;
    input += (u64)t * width;
    float squares = 0.0f;
    for (u32 i = threadIdx.x; i < latent; i += blockDim.x) {
        float x = widen(input[i]);
        squares += x * x;
    }
    float scale = 1.0f / sqrtf(block_sum(squares, scratch) / (float)latent + eps);
    for (u32 i = threadIdx.x; i < latent; i += blockDim.x) {
        store_latent(output[i], widen(input[i]) * scale * weight_at(weight, format, i));
    }
    for (u32 i = latent + threadIdx.x; i < width; i += blockDim.x) store_latent(output[i], widen(input[i]));
}

// One block of 128 threads per token.
//   batch    the batch
//   input    [T, latent + rope] bf16
//   weight   [latent] of the format
//   latents  [blocks, block_tokens, latent + rope] of the entry's type
#define MLA_APPEND(name, Latent)                                                                                      \
    extern "C" __global__ void __launch_bounds__(128) name(                                                           \
        const u32* batch, const bf16* input, const void* weight, u32 format, Latent* latents, u32 latent, u32 rope,   \
        u32 block_tokens, float eps) {                                                                                \
        grid_dependency_synchronize();                                                                                \
        SHARED(float, scratch, 32);                                                                                   \
        append(batch, input, weight, format, latents, latent, rope, block_tokens, eps, scratch);                      \
    }

MLA_APPEND(mla_append, bf16)
MLA_APPEND(mla_append_f16, f16)
MLA_APPEND(mla_append_f32, float)
ENTRY(mla_append)
ENTRY(mla_append_f16)
ENTRY(mla_append_f32)
