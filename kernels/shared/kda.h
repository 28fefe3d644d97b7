// What the kernels of Kimi Delta Attention share: where a head's numbers are, the short convolution, the gates.
#pragma once

#include "batch.h"
#include "weight.h"

// Added to the sum of squares under the root that normalises queries and keys.
#define L2_EPS 1e-6f

// Which pieces run by chunks, as `Form` of the host's side.
enum { BY_LENGTH = 0, ALL_CHUNKS = 1, ALL_STEPS = 2 };

// A layer's heads: of queries and keys, and of values, gates and states; head h reads key head h / (heads / key_heads).
struct Heads {
    u32 key_heads, heads, key_width, value_width;
};

// Elements a row of queries, keys and values side by side.
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

// The most taps of a short convolution that is done where its result is used.
#define MOST_TAPS 4

// The input of a short convolution: [T, channels] bf16, what came before a piece in the tails [slots, channels, taps - 1]
// f32, oldest first, the weight [channels, taps].
struct Conv {
    const bf16* input;
    const void* weight;
    u32 format;
    float* tails;
    u32 taps;
};

// The input of channel `c` at token `t` of a piece; those before the piece are in its tail, or zero.
static __device__ __forceinline__ float conv_input(
    const Conv& conv, u32 channels, u32 start, u32 slot, u32 c, int t) {
    if (t >= 0) return widen(conv.input[(u64)(start + (u32)t) * channels + c]);
    if (slot == NONE) return 0.0f;
    return conv.tails[((u64)slot * channels + c) * (conv.taps - 1) + (u32)(t + (int)conv.taps - 1)];
}

// The convolution and its SiLU for `COUNT` tokens of a piece from `t` on, `length` of them real: the others are 0.
template <int COUNT>
static __device__ __forceinline__ void convolve(
    float (&output)[COUNT], const Conv& conv, u32 channels, u32 start, u32 slot, u32 c, u32 t, u32 length) {
    // Taps at the end, zeros before them.
    float weight[MOST_TAPS], window[MOST_TAPS];
    #pragma unroll
    for (int j = 0; j < MOST_TAPS; j++) {
        int tap = j - (MOST_TAPS - (int)conv.taps);
        weight[j] = tap < 0 ? 0.0f : weight_at(conv.weight, conv.format, (u64)c * conv.taps + (u32)tap);
        // The first token shifts the window by one.
        window[j] = tap < 1 ? 0.0f : conv_input(conv, channels, start, slot, c, (int)t + tap - (int)conv.taps);
    }
    #pragma unroll
    for (int i = 0; i < COUNT; i++) {
        output[i] = 0.0f;
        if ((u32)i >= length) continue;
        float sum = 0.0f;
        #pragma unroll
        for (int j = 0; j + 1 < MOST_TAPS; j++) {
            window[j] = window[j + 1];
            sum = fmaf(weight[j], window[j], sum);
        }
        window[MOST_TAPS - 1] = widen(conv.input[(u64)(start + t + (u32)i) * channels + c]);
        sum = fmaf(weight[MOST_TAPS - 1], window[MOST_TAPS - 1], sum);
        output[i] = silu(sum);
    }
}

// Writes channel `c` of the tail after `after` tokens of a piece. Oldest first, so that a slot may be read and written at
// once: what is written at i was read from i or later.
static __device__ __forceinline__ void keep_tail(
    const Conv& conv, u32 channels, u32 start, u32 slot_in, u32 slot, u32 c, u32 after) {
    float* tail = conv.tails + ((u64)slot * channels + c) * (conv.taps - 1);
    for (u32 i = 0; i + 1 < conv.taps; i++) {
        tail[i] = conv_input(conv, channels, start, slot_in, c, (int)(after + i + 1) - (int)conv.taps);
    }
}

// Channel `c` of all tails that a piece leaves: at its checkpoints, then at its end.
static __device__ __forceinline__ void keep_tails(const Conv& conv, u32 channels, const u32* batch, u32 piece, u32 c) {
    u32 start = piece_word(batch, piece, START), slot_in = piece_word(batch, piece, SLOT_IN);
    const u32* checkpoint = batch + piece_word(batch, piece, CHECKPOINTS);
    for (u32 n = 0; n < piece_word(batch, piece, CHECKPOINT_COUNT); n++, checkpoint += 2) {
        keep_tail(conv, channels, start, slot_in, checkpoint[1], c, checkpoint[0]);
    }
    keep_tail(conv, channels, start, slot_in, piece_word(batch, piece, SLOT_OUT), c, piece_word(batch, piece, LENGTH));
}

// What gates are made of: [T, heads K] bf16, [T, heads] bf16, [heads], [heads K].
struct Gates {
    const bf16* decay;
    const bf16* write;
    const void* a_log;
    const void* dt_bias;
    u32 a_log_format, dt_bias_format;
};

// The rate of a head.
static __device__ __forceinline__ float rate_of(const Gates& gates, u32 head) {
    return -expf(weight_at(gates.a_log, gates.a_log_format, head));
}
