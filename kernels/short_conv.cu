// The short convolution of a KDA layer: causal, depthwise, followed by SiLU, with its state carried between segments.
// Counterpart of src/backend/cpu/short_conv.rs.
#include "shared/kernel.h"
#include "shared/batch.h"
#include "shared/weight.h"

// The input of channel `c`, `back` tokens before token `t` of a segment, back < taps; before the segment from the
// convolution state, and zero before the sequence.
static __device__ __forceinline__ float before(
    const bf16* input, const float* conv_states, u32 start, u32 slot, u32 channels, u32 taps, u32 t, u32 back, u32 c) {
    if (back <= t) return widen(input[(u64)(start + t - back) * channels + c]);
    if (slot == NONE) return 0.0f;
    return conv_states[((u64)slot * channels + c) * (taps - 1) + taps - 1 + t - back];
}

// output_t[c] = silu(sum_j weight[c, j] x_{t - taps + 1 + j}[c]); 256 elements per block. Writes no convolution
// states, because blocks of other tokens still read them.
//   batch   the batch
//   input   [T, channels] bf16
//   weight  [channels, taps] of the format; the last tap multiplies the current token
//   conv_states  [slots, channels, taps - 1] f32, oldest input first
//   output  [T, channels] bf16
extern "C" __global__ void __launch_bounds__(256) short_conv(
    const u32* batch, const bf16* input, const void* weight, u32 format, const float* conv_states, bf16* output, u32 channels,
    u32 taps) {
    grid_dependency_synchronize();
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i >= (u64)batch[TOKENS] * channels) return;
    u32 row = (u32)(i / channels), c = (u32)(i % channels);
    u32 segment = owner(batch, row);
    u32 start = segment_word(batch, segment, START), slot = segment_word(batch, segment, SLOT_IN);
    float sum = 0.0f;
    for (u32 j = 0; j < taps; j++) {
        float x = before(input, conv_states, start, slot, channels, taps, row - start, taps - 1 - j, c);
        sum += weight_at(weight, format, (u64)c * taps + j) * x;
    }
    output[i] = narrow(silu(sum));
}
ENTRY(short_conv)

// Maximum number of inputs in a convolution state.
#define MOST_KEPT 15

// Convolution states at each checkpoint and at the end of every segment; one thread per channel of a segment. The segment's
// own state is read before it is overwritten, because a segment may read and write the same slot.
//   batch   the batch
//   input   [T, channels] bf16
//   conv_states  [slots, channels, taps - 1] f32
extern "C" __global__ void __launch_bounds__(256) short_conv_states(
    const u32* batch, const bf16* input, float* conv_states, u32 channels, u32 taps) {
    grid_dependency_synchronize();
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i >= (u64)batch[SEGMENTS] * channels) return;
    u32 segment = (u32)(i / channels), c = (u32)(i % channels), kept = taps - 1;
    u32 start = segment_word(batch, segment, START), length = segment_word(batch, segment, LENGTH);
    u32 slot = segment_word(batch, segment, SLOT_IN);
    float last[MOST_KEPT];
#pragma unroll
    for (u32 j = 0; j < MOST_KEPT; j++) {
        last[j] = j < kept ? before(input, conv_states, start, slot, channels, taps, length, kept - j, c) : 0.0f;
    }
    u32 checkpoints = segment_word(batch, segment, CHECKPOINTS), count = segment_word(batch, segment, CHECKPOINT_COUNT);
    for (u32 n = 0; n < count; n++) {
        u32 after = batch[checkpoints + CHECKPOINT_WORDS * n + CHECKPOINT_AFTER];
        float* conv_state = conv_states + ((u64)batch[checkpoints + CHECKPOINT_WORDS * n + CHECKPOINT_SLOT] * channels + c) * kept;
        for (u32 j = 0; j < kept; j++) conv_state[j] = before(input, conv_states, start, slot, channels, taps, after, kept - j, c);
    }
    float* conv_state = conv_states + ((u64)segment_word(batch, segment, SLOT_OUT) * channels + c) * kept;
#pragma unroll
    for (u32 j = 0; j < MOST_KEPT; j++) {
        if (j < kept) conv_state[j] = last[j];
    }
}
ENTRY(short_conv_states)
