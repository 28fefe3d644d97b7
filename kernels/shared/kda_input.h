// The part of a thread of `kda_prepare`: two channels of eight tokens of a chunk, from after the convolution and the gates,
// or from before them.
#pragma once

#include "kda.h"

// Tokens and channels per thread.
#define OWN 8
#define PAIR 2

// A thread's numbers: two channels of eight tokens.
typedef float Own[OWN][PAIR];

// The position of a chunk in the batch.
struct Place {
    u32 first, length, start, slot;  // first row, tokens, first row of its segment, the slot that the segment starts from
};

// Number of a thread's tokens from token `t` of a chunk on, at most those of the chunk.
static __device__ __forceinline__ u32 rows_from(const Place& place, u32 t) {
    return place.length < t ? 0 : place.length - t;
}
// The pair of channels from `d` on, or the last pair if `d` is past `width` channels; both are even.
static __device__ __forceinline__ u32 near_pair(u32 d, u32 width) { return min(d, width - PAIR); }

// The source of a chunk's numbers: after the convolution and the gates, or before them. Everything that a thread reads is
// loaded first, and converted then: `Channels` are two channels of its tokens, `Decays` the inputs of its gates.
struct Plain {
    // Whether a head may have more value channels than a block has threads.
    static constexpr bool WIDE = true;
    const bf16* qkv;
    const float* gates;
    const float* beta;
    struct Channels {
        u32 pair[OWN];
    };
    typedef Own Decays;
    typedef float Write;
};
struct Fused {
    static constexpr bool WIDE = false;
    Conv conv;
    Gates gates;
    struct Channels {
        u32 pair[LEAD + OWN], taps[PAIR * TAPS];
    };
    struct Decays {
        u32 pair[OWN], bias[PAIR], a_log[1];
    };
    typedef bf16 Write;
};

// A pair of channels of consecutive rows from row `first` on, `pitch` channels each. For rows before the first one and after
// `last` the nearest are read, so that no load depends on a branch; the caller ignores them.
template <u32 COUNT>
static __device__ __forceinline__ void load_pairs(u32 (&pair)[COUNT], const bf16* at, u32 pitch, int first, u32 last) {
    #pragma unroll
    for (u32 i = 0; i < COUNT; i++) {
        u32 row = (u32)min(max(first + (int)i, 0), (int)last);
        pair[i] = load_word(at + (u64)row * pitch, true);
    }
}

// Channels `d` and `d + 1` of a head, whose `width` channels begin at `c`, at eight tokens from `t` on.
static __device__ __forceinline__ void load_channels(
    Plain::Channels& x, const Plain& from, u32 channels, const Place& place, u32 c, u32 d, u32 width, u32 t) {
    const bf16* at = from.qkv + (u64)(place.first + t) * channels + c + d;
    u32 rows = d < width ? rows_from(place, t) : 0;
    if (channels % 2 == 0 && width % 2 == 0) {
        #pragma unroll
        for (u32 i = 0; i < OWN; i++) {
            x.pair[i] = load_word(at, i < rows);
            at += channels;
        }
    } else {
        #pragma unroll
        for (u32 i = 0; i < OWN; i++) {
            x.pair[i] = i < rows ? pair_of(at[0], d + 1 < width ? at[1] : bf16{0}) : 0;
            at += channels;
        }
    }
}
static __device__ __forceinline__ void load_channels(
    Fused::Channels& x, const Fused& from, u32 channels, const Place& place, u32 c, u32 d, u32 width, u32 t) {
    u32 own = c + near_pair(d, width);
    load_pairs(x.pair, from.conv.input + own, channels, (int)(place.first + t) - LEAD, place.first + place.length - 1);
    load_stored(x.taps, from.conv.weight, from.conv.format, (u64)own * TAPS);
}

static __device__ __forceinline__ void make_channels(
    Own& x, const Plain::Channels& read, const Plain&, u32, const Place&, u32, u32, u32, u32) {
    #pragma unroll
    for (u32 i = 0; i < OWN; i++) {
        x[i][0] = low(read.pair[i]);
        x[i][1] = high(read.pair[i]);
    }
}
static __device__ __forceinline__ void make_channels(
    Own& x, const Fused::Channels& read, const Fused& from, u32 channels, const Place& place, u32 c, u32 d, u32 width, u32 t) {
    float input[PAIR][LEAD + OWN];
    #pragma unroll
    for (u32 i = 0; i < LEAD + OWN; i++) {
        input[0][i] = low(read.pair[i]);
        input[1][i] = high(read.pair[i]);
    }
    u32 before = place.first - place.start + t;
    if (before < LEAD) {
        // Few chunks: inputs from before the segment.
        #pragma unroll
        for (u32 j = 0; j < PAIR; j++) {
            const float* conv_state = conv_state_of(from.conv, channels, place.slot, c + near_pair(d, width) + j);
            #pragma unroll
            for (u32 i = 0; i < LEAD; i++) {
                if (before + i < LEAD) input[j][i] = place.slot == NONE ? 0.0f : conv_state[before + i];
            }
        }
    }
    float both[PAIR * TAPS];
    widen_stored(both, read.taps, from.conv.format, 0);
    #pragma unroll
    for (u32 j = 0; j < PAIR; j++) {
        float taps[TAPS];
        // Channels past the width are zero. Tokens past the chunk's end are not: they write nothing, because their beta is
        // zero, and their output is not read.
        #pragma unroll
        for (u32 n = 0; n < TAPS; n++) taps[n] = d < width ? both[j * TAPS + n] : 0.0f;
        #pragma unroll
        for (u32 i = 0; i < OWN; i++) x[i][j] = convolved(taps, input[j] + i);
    }
}

static __device__ __forceinline__ void load_gates(
    Plain::Decays& gate, const Plain& from, const Heads& h, const Place& place, u32 head, u32 d, u32 t) {
    u32 rows = d < h.key_width ? rows_from(place, t) : 0, pitch = h.heads * h.key_width;
    const float* at = from.gates + (u64)(place.first + t) * pitch + head * h.key_width + d;
    if (h.key_width % 2 == 0) {
        #pragma unroll
        for (u32 i = 0; i < OWN; i++) {
            float2 pair = load_two(at, i < rows);
            gate[i][0] = pair.x;
            gate[i][1] = pair.y;
            at += pitch;
        }
    } else {
        #pragma unroll
        for (u32 i = 0; i < OWN; i++) {
            gate[i][0] = i < rows ? at[0] : 0.0f;
            gate[i][1] = i < rows && d + 1 < h.key_width ? at[1] : 0.0f;
            at += pitch;
        }
    }
}
static __device__ __forceinline__ void load_gates(
    Fused::Decays& x, const Fused& from, const Heads& h, const Place& place, u32 head, u32 d, u32 t) {
    u32 c = head * h.key_width + near_pair(d, h.key_width);
    load_pairs(x.pair, from.gates.decay + c, h.heads * h.key_width, (int)(place.first + t), place.first + place.length - 1);
    load_stored(x.bias, from.gates.dt_bias, from.gates.dt_bias_format, c);
    load_stored(x.a_log, from.gates.a_log, from.gates.a_log_format, head);
}

static __device__ __forceinline__ void make_gates(
    Own& gate, const Plain::Decays& read, const Plain&, const Heads&, const Place&, u32, u32, u32) {
    #pragma unroll
    for (u32 i = 0; i < OWN; i++) {
        gate[i][0] = read[i][0];
        gate[i][1] = read[i][1];
    }
}
static __device__ __forceinline__ void make_gates(
    Own& gate, const Fused::Decays& read, const Fused& from, const Heads& h, const Place& place, u32 head, u32 d, u32 t) {
    float rate = rate_of(from.gates, read.a_log, head), bias[PAIR];
    widen_stored(bias, read.bias, from.gates.dt_bias_format, 0);
    u32 rows = d < h.key_width ? rows_from(place, t) : 0;
    #pragma unroll
    for (u32 i = 0; i < OWN; i++) {
        float left = rate * softplus(low(read.pair[i]) + bias[0]), right = rate * softplus(high(read.pair[i]) + bias[1]);
        gate[i][0] = i < rows ? left : 0.0f;
        gate[i][1] = i < rows ? right : 0.0f;
    }
}

static __device__ __forceinline__ float load_write(const Plain& from, u64 at) { return from.beta[at]; }
static __device__ __forceinline__ bf16 load_write(const Fused& from, u64 at) { return from.gates.write[at]; }
static __device__ __forceinline__ float make_beta(float write) { return write; }
static __device__ __forceinline__ float make_beta(bf16 write) { return sigmoid(widen(write)); }
