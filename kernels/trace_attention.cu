// What one head attends to, of rows of single tokens. Twin of `trace_attention` in src/backend/cpu/trace.rs.
#include "shared/kernel.h"
#include "shared/batch.h"
#include "shared/weight.h"

// The head's query in latent space: absorbed = W_UK^T q_nope; a block of 128 threads a row.
//   batch     the batch
//   query     [T, heads * (nope + rope)] bf16
//   kv_b      [heads * (nope + value), latent] of the format
//   absorbed  [T, latent] f32
extern "C" __global__ void __launch_bounds__(128) trace_attention_absorb(
    const u32* batch, const bf16* query, const void* kv_b, u32 format, float* absorbed, u32 heads, u32 head, u32 nope,
    u32 rope, u32 value, u32 latent) {
    u32 row = blockIdx.x;
    if (row >= batch[TOKENS]) return;
    query += ((u64)row * heads + head) * (nope + rope);
    u64 first = (u64)head * (nope + value) * latent;
    for (u32 i = threadIdx.x; i < latent; i += blockDim.x) {
        float sum = 0.0f;
        for (u32 d = 0; d < nope; d++) sum += widen(query[d]) * weight_at(kv_b, format, first + (u64)d * latent + i);
        absorbed[(u64)row * latent + i] = sum;
    }
}
ENTRY(trace_attention_absorb)

// Scores; a warp a position, four a block (x) of a row (y). Past the row's own position, and for rows of longer pieces, 0.
//   latents  [blocks, block_tokens, latent + rope] bf16
//   output   [T, places] f32
extern "C" __global__ void __launch_bounds__(128) trace_attention_score(
    const u32* batch, const bf16* query, const float* absorbed, const bf16* latents, float* output, u32 heads, u32 head,
    u32 nope, u32 rope, u32 latent, u32 block_tokens, u32 places) {
    u32 row = blockIdx.y, position = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= batch[TOKENS] || position >= places) return;
    u32 piece = owner(batch, row);
    float sum = 0.0f;
    if (piece_word(batch, piece, LENGTH) == 1 && position <= piece_word(batch, piece, POSITION)) {
        u32 block = batch[piece_word(batch, piece, BLOCKS) + position / block_tokens];
        const bf16* cached = latents + ((u64)block * block_tokens + position % block_tokens) * (latent + rope);
        query += ((u64)row * heads + head) * (nope + rope) + nope;
        for (u32 i = lane; i < latent; i += 32) sum += widen(cached[i]) * absorbed[(u64)row * latent + i];
        for (u32 i = lane; i < rope; i += 32) sum += widen(cached[latent + i]) * widen(query[i]);
        sum = warp_sum(sum) / sqrtf((float)(nope + rope));
    }
    if (lane == 0) output[(u64)row * places + position] = sum;
}
ENTRY(trace_attention_score)

// Scores to weights; a block of 256 threads a row.
//   output  [T, places] f32
extern "C" __global__ void __launch_bounds__(256) trace_attention_weigh(const u32* batch, float* output, u32 places) {
    SHARED(float, scratch, 32);
    u32 row = blockIdx.x;
    if (row >= batch[TOKENS]) return;
    u32 piece = owner(batch, row);
    if (piece_word(batch, piece, LENGTH) != 1) return;
    u32 seen = min(piece_word(batch, piece, POSITION) + 1, places);
    output += (u64)row * places;
    float greatest = -INFINITE;
    for (u32 i = threadIdx.x; i < seen; i += blockDim.x) greatest = fmaxf(greatest, output[i]);
    greatest = warp_max(greatest);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = greatest;
    __syncthreads();
    greatest = warp_max(scratch[threadIdx.x % 8]);
    __syncthreads();
    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < seen; i += blockDim.x) sum += expf(output[i] - greatest);
    sum = block_sum(sum, scratch);
    for (u32 i = threadIdx.x; i < seen; i += blockDim.x) output[i] = expf(output[i] - greatest) / sum;
}
ENTRY(trace_attention_weigh)
