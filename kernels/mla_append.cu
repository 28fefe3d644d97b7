// Writes to the latent cache: normalises the latent, copies the shared key part, and appends both to the sequence's blocks.
// Counterpart of src/backend/cpu/mla_append.rs.
#include "shared/kernel.h"
#include "shared/batch.h"
#include "shared/latents.h"
#include "shared/params_mla.h"

template <typename Latent>
static __device__ __forceinline__ void append(const MlaAppendParams& p, float* scratch) {
    u32 t = blockIdx.x;
    if (t >= p.batch[TOKENS]) return;
    u32 segment = owner(p.batch, t), width = p.latent + p.rope;
    u32 position = segment_word(p.batch, segment, POSITION) + t - segment_word(p.batch, segment, START);
    u32 block = p.batch[segment_word(p.batch, segment, BLOCKS) + position / p.block_tokens];
    Latent* output = (Latent*)p.latents + ((u64)block * p.block_tokens + position % p.block_tokens) * width;
    const bf16* input = p.input + (u64)t * width;
    float squares = 0.0f;
    for (u32 i = threadIdx.x; i < p.latent; i += blockDim.x) {
        float x = widen(input[i]);
        squares += x * x;
    }
    float scale = 1.0f / sqrtf(block_sum(squares, scratch) / (float)p.latent + p.eps);
    for (u32 i = threadIdx.x; i < p.latent; i += blockDim.x) {
        store_latent(output[i], widen(input[i]) * scale * weight_at(p.weight, p.format, i));
    }
    for (u32 i = p.latent + threadIdx.x; i < width; i += blockDim.x) store_latent(output[i], widen(input[i]));
}

// One block of 128 threads per token.
#define MLA_APPEND(name, Latent)                                                                                      \
    extern "C" __global__ void __launch_bounds__(128) name(const MlaAppendParams p) {                                 \
        grid_dependency_synchronize();                                                                                \
        SHARED(float, scratch, 32);                                                                                   \
        append<Latent>(p, scratch);                                                                                   \
    }

MLA_APPEND(mla_append, bf16)
MLA_APPEND(mla_append_f16, f16)
MLA_APPEND(mla_append_f32, float)
ENTRY(mla_append)
ENTRY(mla_append_f16)
ENTRY(mla_append_f32)
