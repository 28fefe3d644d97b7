// Generated from `src/backend/cuda/params/trace.rs`.

#pragma once

// The attention weights of one head.
struct TraceAttentionParams {
    const u32* batch;               // the batch
    const bf16* query;              // [T, heads (nope + rope)]
    const void* kv_b;               // [heads (nope + value), latent] of the format
    u32 format;                     // the format of kv_b
    float* absorbed;                // [T, latent], from trace_attention_absorb
    const void* latents;            // [blocks, block_tokens, latent + rope] of the entry's type
    float* output;                  // [T, positions]: scores, then weights
    float* spans;                   // [T, ceil(positions / 128), 2]: greatest score, sum of exponentials
    u32 heads;                      // number of heads
    u32 head;                       // the traced head
    u32 nope;                       // elements of a key without position
    u32 rope;                       // elements of a shared key
    u32 value;                      // elements of a value
    u32 latent;                     // elements of a latent
    u32 block_tokens;               // tokens per block
    u32 positions;                  // elements per row of the output
};
static_assert(sizeof(TraceAttentionParams) == 96);

// The mean output gate of each head.
struct TraceGateParams {
    const u32* batch;               // the batch
    const bf16* gate;               // [T, heads width], before the sigmoid
    float* output;                  // [T, layers, heads]; the part of one layer is written
    u32 heads;                      // number of heads
    u32 width;                      // elements per head
    u32 layer;                      // the layer that is written
    u32 layers;                     // number of layers
};
static_assert(sizeof(TraceGateParams) == 40);

// Statistics of what a KDA layer will write to its states. K and V are the widths of a head's key and value.
struct TraceKdaParams {
    const u32* batch;               // the batch
    const bf16* qkv;                // [T, 2 key_heads K + heads V]
    const float* gates;             // [T, heads K]: log decay
    const float* beta;              // [T, heads]: write strength
    const float* states;            // [slots, heads, K, V]
    float* output;                  // [T, layers, heads, 5 + K]; the part of one layer is written
    u32 key_heads;                  // heads of queries and keys
    u32 heads;                      // heads of values, gates and states
    u32 key_width;                  // K
    u32 value_width;                // V
    u32 layer;                      // the layer that is written
    u32 layers;                     // number of layers
};
static_assert(sizeof(TraceKdaParams) == 72);

// The experts that a layer chose.
struct TraceRouteParams {
    const u32* batch;               // the batch
    const u32* experts;             // [T, top]
    const float* weights;           // [T, top]
    float* output;                  // [T, layers, 2, top]: experts, then weights; the part of one layer is written
    u32 top;                        // choices per token
    u32 layer;                      // the layer that is written
    u32 layers;                     // number of layers
};
static_assert(sizeof(TraceRouteParams) == 48);

// One head's state.
struct TraceStateParams {
    const u32* batch;               // the batch
    const float* states;            // [slots, heads, size]
    float* output;                  // [T, size]
    u32 heads;                      // number of heads
    u32 head;                       // the traced head
    u32 size;                       // elements of a state, K V
};
static_assert(sizeof(TraceStateParams) == 40);

// Checked by the host's compiler: the struct of each entry point, and offsets, for which
// NVRTC has no function.
#ifndef __CUDACC__
extern "C" __global__ void trace_attention_absorb(TraceAttentionParams p);
extern "C" __global__ void trace_attention_score(TraceAttentionParams p);
extern "C" __global__ void trace_attention_score_f16(TraceAttentionParams p);
extern "C" __global__ void trace_attention_score_f32(TraceAttentionParams p);
extern "C" __global__ void trace_attention_weigh(TraceAttentionParams p);
static_assert(offsetof(TraceAttentionParams, batch) == 0 && offsetof(TraceAttentionParams, query) == 8
              && offsetof(TraceAttentionParams, kv_b) == 16 && offsetof(TraceAttentionParams, format) == 24
              && offsetof(TraceAttentionParams, absorbed) == 32 && offsetof(TraceAttentionParams, latents) == 40
              && offsetof(TraceAttentionParams, output) == 48 && offsetof(TraceAttentionParams, spans) == 56
              && offsetof(TraceAttentionParams, heads) == 64 && offsetof(TraceAttentionParams, head) == 68
              && offsetof(TraceAttentionParams, nope) == 72 && offsetof(TraceAttentionParams, rope) == 76
              && offsetof(TraceAttentionParams, value) == 80 && offsetof(TraceAttentionParams, latent) == 84
              && offsetof(TraceAttentionParams, block_tokens) == 88 && offsetof(TraceAttentionParams, positions) == 92);
extern "C" __global__ void trace_gate(TraceGateParams p);
static_assert(offsetof(TraceGateParams, batch) == 0 && offsetof(TraceGateParams, gate) == 8
              && offsetof(TraceGateParams, output) == 16 && offsetof(TraceGateParams, heads) == 24
              && offsetof(TraceGateParams, width) == 28 && offsetof(TraceGateParams, layer) == 32
              && offsetof(TraceGateParams, layers) == 36);
extern "C" __global__ void trace_kda(TraceKdaParams p);
static_assert(offsetof(TraceKdaParams, batch) == 0 && offsetof(TraceKdaParams, qkv) == 8
              && offsetof(TraceKdaParams, gates) == 16 && offsetof(TraceKdaParams, beta) == 24
              && offsetof(TraceKdaParams, states) == 32 && offsetof(TraceKdaParams, output) == 40
              && offsetof(TraceKdaParams, key_heads) == 48 && offsetof(TraceKdaParams, heads) == 52
              && offsetof(TraceKdaParams, key_width) == 56 && offsetof(TraceKdaParams, value_width) == 60
              && offsetof(TraceKdaParams, layer) == 64 && offsetof(TraceKdaParams, layers) == 68);
extern "C" __global__ void trace_route(TraceRouteParams p);
static_assert(offsetof(TraceRouteParams, batch) == 0 && offsetof(TraceRouteParams, experts) == 8
              && offsetof(TraceRouteParams, weights) == 16 && offsetof(TraceRouteParams, output) == 24
              && offsetof(TraceRouteParams, top) == 32 && offsetof(TraceRouteParams, layer) == 36
              && offsetof(TraceRouteParams, layers) == 40);
extern "C" __global__ void trace_state(TraceStateParams p);
static_assert(offsetof(TraceStateParams, batch) == 0 && offsetof(TraceStateParams, states) == 8
              && offsetof(TraceStateParams, output) == 16 && offsetof(TraceStateParams, heads) == 24
              && offsetof(TraceStateParams, head) == 28 && offsetof(TraceStateParams, size) == 32);
#endif
