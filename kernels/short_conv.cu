// The short convolution of a KDA layer: causal, depthwise, followed by SiLU, with its state carried between segments.
// Counterpart of src/backend/cpu/short_conv.rs.
#include "shared/kernel.h"
#include "shared/batch.h"
#include "shared/weight.h"
#include "shared/params_kda.h"

// The input of channel `c`, `back` tokens before token `t` of a segment, back < taps; before the segment from the
// convolution state, and zero before the sequence.
static __device__ __forceinline__ float before(const ShortConvParams& p, u32 start, u32 slot, u32 t, u32 back, u32 c) {
    if (back <= t) return widen(p.input[(u64)(start + t - back) * p.channels + c]);
    if (slot == NONE) return 0.0f;
    return p.conv_states[((u64)slot * p.channels + c) * (p.taps - 1) + p.taps - 1 + t - back];
}

// output_t[c] = silu(sum_j weight[c, j] x_{t - taps + 1 + j}[c]); 256 elements per block. Writes no convolution
// states, because blocks of other tokens still read them.
extern "C" __global__ void __launch_bounds__(256) short_conv(const ShortConvParams p) {
    grid_dependency_synchronize();
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i >= (u64)p.batch[TOKENS] * p.channels) return;
    u32 row = (u32)(i / p.channels), c = (u32)(i % p.channels);
    u32 segment = owner(p.batch, row);
    u32 start = segment_word(p.batch, segment, START), slot = segment_word(p.batch, segment, SLOT_IN);
    float sum = 0.0f;
    for (u32 j = 0; j < p.taps; j++) {
        float x = before(p, start, slot, row - start, p.taps - 1 - j, c);
        sum += weight_at(p.weight, p.format, (u64)c * p.taps + j) * x;
    }
    p.output[i] = narrow(silu(sum));
}
ENTRY(short_conv)

// Maximum number of inputs in a convolution state.
#define MOST_KEPT 15

// Convolution states at each checkpoint and at the end of every segment; one thread per channel of a segment. The segment's
// own state is read before it is overwritten, because a segment may read and write the same slot.
extern "C" __global__ void __launch_bounds__(256) short_conv_states(const ShortConvParams p) {
    grid_dependency_synchronize();
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i >= (u64)p.batch[SEGMENTS] * p.channels) return;
    u32 segment = (u32)(i / p.channels), c = (u32)(i % p.channels), kept = p.taps - 1;
    u32 start = segment_word(p.batch, segment, START), length = segment_word(p.batch, segment, LENGTH);
    u32 slot = segment_word(p.batch, segment, SLOT_IN);
    float last[MOST_KEPT];
#pragma unroll
    for (u32 j = 0; j < MOST_KEPT; j++) {
        last[j] = j < kept ? before(p, start, slot, length, kept - j, c) : 0.0f;
    }
    u32 checkpoints = segment_word(p.batch, segment, CHECKPOINTS), count = segment_word(p.batch, segment, CHECKPOINT_COUNT);
    for (u32 n = 0; n < count; n++) {
        u32 after = p.batch[checkpoints + CHECKPOINT_WORDS * n + CHECKPOINT_AFTER];
        u32 to = p.batch[checkpoints + CHECKPOINT_WORDS * n + CHECKPOINT_SLOT];
        float* conv_state = p.conv_states + ((u64)to * p.channels + c) * kept;
        for (u32 j = 0; j < kept; j++) conv_state[j] = before(p, start, slot, after, kept - j, c);
    }
    float* conv_state = p.conv_states + ((u64)segment_word(p.batch, segment, SLOT_OUT) * p.channels + c) * kept;
#pragma unroll
    for (u32 j = 0; j < MOST_KEPT; j++) {
        if (j < kept) conv_state[j] = last[j];
    }
}
ENTRY(short_conv_states)
