// The attention weights of one head, for rows of single tokens. Counterpart of `trace_attention` in src/backend/cpu/trace.rs.
#include "shared/kernel.h"
#include "shared/batch.h"
#include "shared/latents.h"
#include "shared/params_trace.h"

// The head's query in latent space: absorbed = W_UK^T q_nope; one block of 128 threads per row.
extern "C" __global__ void __launch_bounds__(128) trace_attention_absorb(const TraceAttentionParams p) {
    grid_dependency_synchronize();
    u32 row = blockIdx.x;
    if (row >= p.batch[TOKENS]) return;
    const bf16* query = p.query + ((u64)row * p.heads + p.head) * (p.nope + p.rope);
    u64 first = (u64)p.head * (p.nope + p.value) * p.latent;
    for (u32 i = threadIdx.x; i < p.latent; i += blockDim.x) {
        float sum = 0.0f;
        for (u32 d = 0; d < p.nope; d++) sum += widen(query[d]) * weight_at(p.kv_b, p.format, first + (u64)d * p.latent + i);
        p.absorbed[(u64)row * p.latent + i] = sum;
    }
}
ENTRY(trace_attention_absorb)

// Positions per block.
#define SPAN 128

template <typename Latent>
static __device__ __forceinline__ void score_span(const TraceAttentionParams& p, float* scratch, float* scores) {
    u32 row = blockIdx.y, first = blockIdx.x * SPAN, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= p.batch[TOKENS] || first >= p.positions) return;
    u32 segment = owner(p.batch, row);
    if (segment_word(p.batch, segment, LENGTH) != 1) return;
    u32 seen = min(segment_word(p.batch, segment, POSITION) + 1, p.positions);
    if (first >= seen) return;
    const u32* blocks = p.batch + segment_word(p.batch, segment, BLOCKS);
    const bf16* query = p.query + ((u64)row * p.heads + p.head) * (p.nope + p.rope) + p.nope;
    const float* absorbed = p.absorbed + (u64)row * p.latent;
    for (u32 i = warp; i < SPAN; i += 4) {
        u32 position = first + i;
        float sum = 0.0f;
        if (position < seen) {
            u64 at = (u64)blocks[position / p.block_tokens] * p.block_tokens + position % p.block_tokens;
            const Latent* cached = (const Latent*)p.latents + at * (p.latent + p.rope);
            for (u32 l = lane; l < p.latent; l += 32) sum += widen(cached[l]) * absorbed[l];
            for (u32 r = lane; r < p.rope; r += 32) sum += widen(cached[p.latent + r]) * widen(query[r]);
        }
        sum = warp_sum(sum) / sqrtf((float)(p.nope + p.rope));
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
    if (first + threadIdx.x < seen) p.output[(u64)row * p.positions + first + threadIdx.x] = score;
    if (threadIdx.x == 0) {
        float* spans = p.spans + 2 * ((u64)row * ((p.positions + SPAN - 1) / SPAN) + blockIdx.x);
        spans[0] = greatest;
        spans[1] = sum;
    }
}

// The scores of a span (x) of a row (y), with their maximum and the sum of their exponentials; one block of 128 threads, one
// warp per position. Positions after the row's own are not written; rows of longer segments have none.
#define TRACE_ATTENTION_SCORE(name, Latent)                                                                           \
    extern "C" __global__ void __launch_bounds__(128) name(const TraceAttentionParams p) {                            \
        grid_dependency_synchronize();                                                                                \
        SHARED(float, scratch, 32);                                                                                   \
        SHARED(float, scores, SPAN);                                                                                  \
        score_span<Latent>(p, scratch, scores);                                                                       \
    }

TRACE_ATTENTION_SCORE(trace_attention_score, bf16)
TRACE_ATTENTION_SCORE(trace_attention_score_f16, f16)
TRACE_ATTENTION_SCORE(trace_attention_score_f32, float)
ENTRY(trace_attention_score)
ENTRY(trace_attention_score_f16)
ENTRY(trace_attention_score_f32)

// Converts scores to weights, with the maximum and sum over all spans of the row; one block of 128 threads per span (x) of a
// row (y). Positions after the row's own are zero, and all positions for rows of longer segments.
extern "C" __global__ void __launch_bounds__(128) trace_attention_weigh(const TraceAttentionParams p) {
    grid_dependency_synchronize();
    SHARED(float, scratch, 32);
    u32 row = blockIdx.y, position = blockIdx.x * SPAN + threadIdx.x;
    if (row >= p.batch[TOKENS]) return;
    u32 segment = owner(p.batch, row), seen = 0;
    if (segment_word(p.batch, segment, LENGTH) == 1) seen = min(segment_word(p.batch, segment, POSITION) + 1, p.positions);
    const float* spans = p.spans + 2 * (u64)row * ((p.positions + SPAN - 1) / SPAN);
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
    if (position >= p.positions) return;
    float* weight = p.output + (u64)row * p.positions + position;
    *weight = position < seen ? expf(*weight - greatest) / sum : 0.0f;
}
ENTRY(trace_attention_weigh)
