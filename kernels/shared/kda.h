// Definitions for the kernels of Kimi Delta Attention: offsets of a head's numbers, the short convolution, the gates.
#pragma once

#include "batch.h"
#include "weight.h"

// Added to the sum of squares under the root that normalises queries and keys.
#define L2_EPS 1e-6f

// A layer's heads: of queries and keys, and of values, gates and states; head h reads key head h / (heads / key_heads).
struct Heads {
    u32 key_heads, heads, key_width, value_width;
};

// Elements per row of queries, keys and values side by side.
static __device__ __forceinline__ u32 channels_of(const Heads& h) {
    return 2 * h.key_heads * h.key_width + h.heads * h.value_width;
}
// The first channel of a head's query; its key is `key_heads key_width` further on.
static __device__ __forceinline__ u32 query_channel(const Heads& h, u32 head) {
    return head / (h.heads / h.key_heads) * h.key_width;
}
static __device__ __forceinline__ u32 value_channel(const Heads& h, u32 head) {
    return 2 * h.key_heads * h.key_width + head * h.value_width;
}
// The first element of a head's state [K, V] in the pool of one layer, [slots, heads, K, V].
static __device__ __forceinline__ u64 state_at(const Heads& h, u32 slot, u32 head) {
    return ((u64)slot * h.heads + head) * h.key_width * h.value_width;
}

static __device__ __forceinline__ bool by_chunks(u32 form, u32 length) {
    return form == ALL_CHUNKS || (form == BY_LENGTH && length > 1);
}

// Taps of a short convolution that is fused with its consumer, and the number of earlier tokens that it reads.
#define TAPS 4
#define LEAD (TAPS - 1)

// The input of a short convolution: [T, channels] bf16, the inputs before a segment in the convolution states [slots,
// channels, LEAD] f32, oldest first, the weight [channels, TAPS].
struct Conv {
    const bf16* input;
    const void* weight;
    u32 format;
    float* conv_states;
};

// The address of channel `c` of a slot's convolution state.
static __device__ __forceinline__ float* conv_state_of(const Conv& conv, u32 channels, u32 slot, u32 c) {
    return conv.conv_states + ((u64)slot * channels + c) * LEAD;
}

// The convolution and its SiLU at one token, whose input is the last of these.
static __device__ __forceinline__ float convolved(const float (&taps)[TAPS], const float* input) {
    float sum = taps[0] * input[0];
    #pragma unroll
    for (u32 j = 1; j < TAPS; j++) sum = fmaf(taps[j], input[j], sum);
    return silu(sum);
}

// Writes channel `c` of the convolution state after `after` tokens of a segment. Oldest first, so that a slot may be read and
// written at the same time: the value written at i was read from i or later.
static __device__ __forceinline__ void keep_conv_state(
    const Conv& conv, u32 channels, u32 start, u32 slot_in, u32 slot, u32 c, u32 after) {
    float* conv_state = conv_state_of(conv, channels, slot, c);
    for (u32 i = 0; i < LEAD; i++) {
        if (after + i >= LEAD) {
            conv_state[i] = widen(conv.input[(u64)(start + after + i - LEAD) * channels + c]);
        } else {
            conv_state[i] = slot_in == NONE ? 0.0f : conv_state_of(conv, channels, slot_in, c)[after + i];
        }
    }
}

// Channel `c` of all convolution states that a segment writes: at its checkpoints, then at its end.
static __device__ __forceinline__ void keep_conv_states(const Conv& conv, u32 channels, const u32* batch, u32 segment, u32 c) {
    u32 start = segment_word(batch, segment, START), slot_in = segment_word(batch, segment, SLOT_IN);
    const u32* checkpoint = batch + segment_word(batch, segment, CHECKPOINTS);
    for (u32 n = 0; n < segment_word(batch, segment, CHECKPOINT_COUNT); n++, checkpoint += CHECKPOINT_WORDS) {
        keep_conv_state(conv, channels, start, slot_in, checkpoint[CHECKPOINT_SLOT], c, checkpoint[CHECKPOINT_AFTER]);
    }
    keep_conv_state(conv, channels, start, slot_in, segment_word(batch, segment, SLOT_OUT), c, segment_word(batch, segment, LENGTH));
}

// The inputs of gates: [T, heads K] bf16, [T, heads] bf16, [heads], [heads K].
struct Gates {
    const bf16* decay;
    const bf16* write;
    const void* a_log;
    const void* dt_bias;
    u32 a_log_format, dt_bias_format;
};

// The rate of a head, from its `a_log`.
static __device__ __forceinline__ float rate_of(const Gates& gates, const u32 (&a_log)[1], u32 head) {
    float x[1];
    widen_stored(x, a_log, gates.a_log_format, head);
    return -expf(x[0]);
}
