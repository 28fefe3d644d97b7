// The attention weights of one head, for rows of single tokens. Counterpart of `trace_attention` in src/backend/cpu/trace.rs.
#include "shared/kernel.h"
#include "shared/batch.h"
#include "shared/latents.h"

// The head's query in latent space: absorbed = W_UK^T q_nope; one block of 128 threads per row.
//   batch     the batch
//   query     [T, heads * (nope + rope)] bf16
//   kv_b      [heads * (nope + value), latent] of the format
//   absorbed  [T, latent] f32
extern "C" __global__ void __launch_bounds__(128) trace_attention_absorb(
    const u32* batch, const bf16* query, const void* kv_b, u32 format, float* absorbed, u32 heads, u32 head, u32 nope,
    u32 rope, u32 value, u32 latent) {
    grid_dependency_synchronize();
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

// Positions per block.
#define SPAN 128

template <typename Latent>
static __device__ __forceinline__ void score_span(
    const u32* batch, const bf16* query, const float* absorbed, const Latent* latents, float* output, float* spans, u32 heads,
    u32 head, u32 nope, u32 rope, u32 latent, u32 block_tokens, u32 positions, float* scratch, float* scores) {
    u32 row = blockIdx.y, first = blockIdx.x * SPAN, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= batch[TOKENS] || first >= positions) return;
    u32 segment = owner(batch, row);
    if (segment_word(batch, segment, LENGTH) != 1) return;
    u32 seen = min(segment_word(batch, segment, POSITION) + 1, positions);
    if (first >= seen) return;
    const u32* blocks = batch + segment_word(batch, segment, BLOCKS);
    query += ((u64)row * heads + head) * (nope + rope) + nope;
    absorbed += (u64)row * latent;
    for (u32 i = warp; i < SPAN; i += 4) {
        u32 position = first + i;
        float sum = 0.0f;
        if (position < seen) {
            u64 at = (u64)blocks[position / block_tokens] * block_tokens + position % block_tokens;
            const Latent* cached = latents + at * (latent + rope);
            for (u32 l = lane; l < latent; l += 32) sum += widen(cached[l]) * absorbed[l];
            for (u32 r = lane; r < rope; r += 32) sum += widen(cached[latent + r]) * widen(query[r]);
        }
        sum = warp_sum(sum) / sqrtf((float)(nope + rope));
        if (lane == 0) scores[i] = position < seen ? sum : -INFINITE;
    }
    __syncthreads();
    float score = scores[threadIdx.x];
    float greatest = warp_max(score);
    if (lane == 0) scratch[warp] = greatest;
    __syncthreads();
    greatest = fmaxf(fmaxf(scratch[0], scratch[1]), fmaxf(scratch[2], scratch[3]));
    __syncthreads();
    float sum = block_sum(expf(score - greatest), scratch);
    if (first + threadIdx.x < seen) output[(u64)row * positions + first + threadIdx.x] = score;
    if (threadIdx.x == 0) {
        spans += 2 * ((u64)row * ((positions + SPAN - 1) / SPAN) + blockIdx.x);
        spans[0] = greatest;
        spans[1] = sum;
    }
}

// The scores of a span (x) of a row (y), with their maximum and the sum of their exponentials; one block of 128 threads, one
// warp per position. Positions after the row's own are not written; rows of longer segments have none.
//   batch    the batch
//   query    [T, heads * (nope + rope)] bf16
//   absorbed [T, latent] f32, from `trace_attention_absorb`
//   latents  [blocks, block_tokens, latent + rope] of the entry's type
//   output   [T, positions] f32
//   spans    [T, ceil(positions / SPAN), 2] f32
#define TRACE_ATTENTION_SCORE(name, Latent)                                                                           \
    extern "C" __global__ void __launch_bounds__(128) name(                                                           \
        const u32* batch, const bf16* query, const float* absorbed, const Latent* latents, float* output,             \
        float* spans, u32 heads, u32 head, u32 nope, u32 rope, u32 latent, u32 block_tokens, u32 positions) {            \
        grid_dependency_synchronize();                                                                                   \
        SHARED(float, scratch, 32);                                                                                   \
        SHARED(float, scores, SPAN);                                                                                  \
        score_span(                                                                                                   \
            batch, query, absorbed, latents, output, spans, heads, head, nope, rope, latent, block_tokens, positions,    \
            scratch, scores);                                                                                         \
    }

TRACE_ATTENTION_SCORE(trace_attention_score, bf16)
TRACE_ATTENTION_SCORE(trace_attention_score_f16, f16)
TRACE_ATTENTION_SCORE(trace_attention_score_f32, float)
ENTRY(trace_attention_score)
ENTRY(trace_attention_score_f16)
ENTRY(trace_attention_score_f32)

// Converts scores to weights, with the maximum and sum over all spans of the row; one block of 128 threads per span (x) of a
// row (y). Positions after the row's own are zero, and all positions for rows of longer segments.
//   batch   the batch
//   output  [T, positions] f32
//   spans   [T, ceil(positions / SPAN), 2] f32
extern "C" __global__ void __launch_bounds__(128) trace_attention_weigh(
    const u32* batch, float* output, const float* spans, u32 positions) {
    grid_dependency_synchronize();
    SHARED(float, scratch, 32);
    u32 row = blockIdx.y, position = blockIdx.x * SPAN + threadIdx.x;
    if (row >= batch[TOKENS]) return;
    u32 segment = owner(batch, row), seen = 0;
    if (segment_word(batch, segment, LENGTH) == 1) seen = min(segment_word(batch, segment, POSITION) + 1, positions);
    spans += 2 * (u64)row * ((positions + SPAN - 1) / SPAN);
    u32 count = (seen + SPAN - 1) / SPAN;
    float greatest = -INFINITE;
    for (u32 i = threadIdx.x; i < count; i += blockDim.x) greatest = fmaxf(greatest, spans[2 * i]);
    greatest = warp_max(greatest);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = greatest;
    __syncthreads();
    greatest = fmaxf(fmaxf(scratch[0], scratch[1]), fmaxf(scratch[2], scratch[3]));
    __syncthreads();
    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < count; i += blockDim.x) sum += spans[2 * i + 1] * expf(spans[2 * i] - greatest);
    sum = block_sum(sum, scratch);
    if (position >= positions) return;
    float* weight = output + (u64)row * positions + position;
    *weight = position < seen ? expf(*weight - greatest) / sum : 0.0f;
}
ENTRY(trace_attention_weigh)
