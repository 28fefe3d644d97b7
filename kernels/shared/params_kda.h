// Generated from `src/backend/cuda/params/kda.rs`.

#pragma once

// The short convolution, and its states at the end of segments and at checkpoints.
struct ShortConvParams {
    const u32* batch;               // the batch
    const bf16* input;              // [T, channels]
    const void* weight;             // [channels, taps] of the format; the last tap multiplies the current token
    u32 format;                     // the weight's format
    float* conv_states;             // [slots, channels, taps - 1], oldest input first
    bf16* output;                   // [T, channels]
    u32 channels;                   // elements per row
    u32 taps;                       // inputs of an output
};
static_assert(sizeof(ShortConvParams) == 56);

// Log decay per channel and write strength per head.
struct KdaGatesParams {
    const u32* batch;               // the batch
    const bf16* decay;              // [T, heads K]
    const bf16* write;              // [T, heads]
    const void* a_log;              // [heads] of its format
    u32 a_log_format;               // the format of a_log
    const void* dt_bias;            // [heads K] of its format
    u32 dt_bias_format;             // the format of dt_bias
    float* gates;                   // [T, heads K]: log decay
    float* beta;                    // [T, heads]: write strength
    u32 heads;                      // number of heads
    u32 key_width;                  // K
};
static_assert(sizeof(KdaGatesParams) == 80);

// The norm of each head, times a sigmoid gate.
struct GatedNormParams {
    const u32* batch;               // the batch
    const bf16* input;              // [T, heads width]
    const bf16* gate;               // [T, heads width], before the sigmoid
    const void* weight;             // [width] of the format
    u32 format;                     // the weight's format
    bf16* output;                   // [T, heads width]
    u32 heads;                      // number of heads
    u32 width;                      // elements per head, V
    float eps;                      // added to the mean of squares
};
static_assert(sizeof(GatedNormParams) == 64);

// Images of chunks, from the outputs of the convolution and the gates.
struct KdaPrepareParams {
    const u32* batch;               // the batch; its chunks are those of segments that run by chunks
    const bf16* qkv;                // [T, channels], after the convolution
    const float* gates;             // [T, heads K]: log decay
    const float* beta;              // [T, heads]: write strength
    u8* workspace;                  // [chunks, heads, image_bytes], aligned to 16 bytes
    u32 key_heads;                  // heads of queries and keys
    u32 heads;                      // heads of values, gates and states
    u32 key_width;                  // K
    u32 value_width;                // V
    u32 form;                       // BY_LENGTH, ALL_CHUNKS or ALL_STEPS
};
static_assert(sizeof(KdaPrepareParams) == 64);

// Images of chunks, from the inputs of the convolution and the gates.
struct KdaPrepareFusedParams {
    const u32* batch;               // the batch; its chunks are those of segments that run by chunks
    const bf16* input;              // [T, channels], before the convolution
    const void* weight;             // [channels, 4] of the format
    u32 format;                     // the weight's format
    float* conv_states;             // [slots, channels, 3], read
    const bf16* decay;              // [T, heads K]
    const bf16* write;              // [T, heads]
    const void* a_log;              // [heads] of its format
    u32 a_log_format;               // the format of a_log
    const void* dt_bias;            // [heads K] of its format
    u32 dt_bias_format;             // the format of dt_bias
    u8* workspace;                  // [chunks, heads, image_bytes], aligned to 16 bytes
    u32 key_heads;                  // heads of queries and keys
    u32 heads;                      // heads of values, gates and states
    u32 key_width;                  // K, even
    u32 value_width;                // V, even
    u32 form;                       // BY_LENGTH, ALL_CHUNKS or ALL_STEPS
};
static_assert(sizeof(KdaPrepareFusedParams) == 120);

// The scan of the state over the images of chunks. P is the entry's width of keys, at least K.
struct KdaScanParams {
    const u32* batch;               // the batch; its scans are those of segments that run by chunks
    const u8* workspace;            // [chunks, heads, image_bytes], written by kda_prepare
    const float* operators;         // [splits, heads, 16 ceil(V / 16) + P, P], written by kda_seeds; null if no segment is cut into splits
    float* states;                  // [slots, heads, K, V]
    bf16* output;                   // [T, heads V], aligned to 16 bytes
    const bf16* input;              // [T, channels], before the convolution, if kda_prepare_fused ran: then convolution states are written; else null
    float* conv_states;             // [slots, channels, 3], or null
    u32 key_heads;                  // heads of queries and keys
    u32 heads;                      // heads of values, gates and states
    u32 key_width;                  // K
    u32 value_width;                // V
    u32 form;                       // BY_LENGTH, ALL_CHUNKS or ALL_STEPS
};
static_assert(sizeof(KdaScanParams) == 80);

// Splits of long segments: their affine maps, then their entry states. P is the entry's width of keys, at least K.
struct KdaSplitsParams {
    const u32* batch;               // the batch
    const u8* workspace;            // [chunks, heads, image_bytes], written by kda_prepare
    float* operators;               // [splits, heads, 16 ceil(V / 16) + P, P]: columns of B, which kda_seeds replaces, then of M
    const float* states;            // [slots, heads, K, V]
    u32 heads;                      // heads of values, gates and states
    u32 key_width;                  // K
    u32 value_width;                // V
};
static_assert(sizeof(KdaSplitsParams) == 48);

// The recurrence by steps.
struct KdaStepParams {
    const u32* batch;               // the batch
    const bf16* qkv;                // [T, channels], after the convolution
    const float* gates;             // [T, heads K]: log decay
    const float* beta;              // [T, heads]: write strength
    float* states;                  // [slots, heads, K, V], aligned to 16 bytes
    bf16* output;                   // [T, heads V]
    u32 key_heads;                  // heads of queries and keys
    u32 heads;                      // heads of values, gates and states
    u32 key_width;                  // K, at most 128
    u32 value_width;                // V, at most 128
    u32 form;                       // BY_LENGTH, ALL_CHUNKS or ALL_STEPS
};
static_assert(sizeof(KdaStepParams) == 72);

// A decode in one kernel; with the second projections of decay and output gate in `kda_decode_projected`.
struct KdaDecodeParams {
    const u32* batch;               // the batch
    const bf16* input;              // [T, channels], before the convolution
    const void* weight;             // [channels, 4] of the format
    u32 format;                     // the weight's format
    float* conv_states;             // [slots, channels, 3]
    const bf16* decay;              // [T, heads K]; null if projected
    const bf16* decay_rank;         // [T, rank]; null unless projected, like the next
    const bf16* decay_up;           // [heads K, rank]
    const bf16* write;              // [T, heads]
    const void* a_log;              // [heads] of its format
    u32 a_log_format;               // the format of a_log
    const void* dt_bias;            // [heads K] of its format
    u32 dt_bias_format;             // the format of dt_bias
    const bf16* gate;               // [T, heads V], before the sigmoid; null if projected
    const bf16* gate_rank;          // [T, rank]; null unless projected, like the next
    const bf16* gate_up;            // [heads V, rank]
    u32 rank;                       // a multiple of eight, at most 128; 0 unless projected
    const void* norm;               // [V] of its format
    u32 norm_format;                // the norm's format
    float eps;                      // added to the mean of squares
    float* states;                  // [slots, heads, K, V], aligned to 16 bytes
    bf16* output;                   // [T, heads V], gated and normalised
    u32 heads;                      // heads of queries, keys and values
    u32 key_width;                  // K, at most 128
    u32 value_width;                // V, at most 128
};
static_assert(sizeof(KdaDecodeParams) == 184);

// Checked by the host's compiler: the struct of each entry point, and offsets, for which
// NVRTC has no function.
#ifndef __CUDACC__
extern "C" __global__ void short_conv(ShortConvParams p);
extern "C" __global__ void short_conv_states(ShortConvParams p);
static_assert(offsetof(ShortConvParams, batch) == 0 && offsetof(ShortConvParams, input) == 8
              && offsetof(ShortConvParams, weight) == 16 && offsetof(ShortConvParams, format) == 24
              && offsetof(ShortConvParams, conv_states) == 32 && offsetof(ShortConvParams, output) == 40
              && offsetof(ShortConvParams, channels) == 48 && offsetof(ShortConvParams, taps) == 52);
extern "C" __global__ void kda_gates(KdaGatesParams p);
static_assert(offsetof(KdaGatesParams, batch) == 0 && offsetof(KdaGatesParams, decay) == 8
              && offsetof(KdaGatesParams, write) == 16 && offsetof(KdaGatesParams, a_log) == 24
              && offsetof(KdaGatesParams, a_log_format) == 32 && offsetof(KdaGatesParams, dt_bias) == 40
              && offsetof(KdaGatesParams, dt_bias_format) == 48 && offsetof(KdaGatesParams, gates) == 56
              && offsetof(KdaGatesParams, beta) == 64 && offsetof(KdaGatesParams, heads) == 72
              && offsetof(KdaGatesParams, key_width) == 76);
extern "C" __global__ void gated_norm(GatedNormParams p);
static_assert(offsetof(GatedNormParams, batch) == 0 && offsetof(GatedNormParams, input) == 8
              && offsetof(GatedNormParams, gate) == 16 && offsetof(GatedNormParams, weight) == 24
              && offsetof(GatedNormParams, format) == 32 && offsetof(GatedNormParams, output) == 40
              && offsetof(GatedNormParams, heads) == 48 && offsetof(GatedNormParams, width) == 52
              && offsetof(GatedNormParams, eps) == 56);
extern "C" __global__ void kda_prepare_32(KdaPrepareParams p);
extern "C" __global__ void kda_prepare_64(KdaPrepareParams p);
extern "C" __global__ void kda_prepare_128(KdaPrepareParams p);
static_assert(offsetof(KdaPrepareParams, batch) == 0 && offsetof(KdaPrepareParams, qkv) == 8
              && offsetof(KdaPrepareParams, gates) == 16 && offsetof(KdaPrepareParams, beta) == 24
              && offsetof(KdaPrepareParams, workspace) == 32 && offsetof(KdaPrepareParams, key_heads) == 40
              && offsetof(KdaPrepareParams, heads) == 44 && offsetof(KdaPrepareParams, key_width) == 48
              && offsetof(KdaPrepareParams, value_width) == 52 && offsetof(KdaPrepareParams, form) == 56);
extern "C" __global__ void kda_prepare_fused_32(KdaPrepareFusedParams p);
extern "C" __global__ void kda_prepare_fused_64(KdaPrepareFusedParams p);
extern "C" __global__ void kda_prepare_fused_128(KdaPrepareFusedParams p);
static_assert(offsetof(KdaPrepareFusedParams, batch) == 0 && offsetof(KdaPrepareFusedParams, input) == 8
              && offsetof(KdaPrepareFusedParams, weight) == 16 && offsetof(KdaPrepareFusedParams, format) == 24
              && offsetof(KdaPrepareFusedParams, conv_states) == 32 && offsetof(KdaPrepareFusedParams, decay) == 40
              && offsetof(KdaPrepareFusedParams, write) == 48 && offsetof(KdaPrepareFusedParams, a_log) == 56
              && offsetof(KdaPrepareFusedParams, a_log_format) == 64 && offsetof(KdaPrepareFusedParams, dt_bias) == 72
              && offsetof(KdaPrepareFusedParams, dt_bias_format) == 80
              && offsetof(KdaPrepareFusedParams, workspace) == 88 && offsetof(KdaPrepareFusedParams, key_heads) == 96
              && offsetof(KdaPrepareFusedParams, heads) == 100 && offsetof(KdaPrepareFusedParams, key_width) == 104
              && offsetof(KdaPrepareFusedParams, value_width) == 108 && offsetof(KdaPrepareFusedParams, form) == 112);
extern "C" __global__ void kda_scan_32(KdaScanParams p);
extern "C" __global__ void kda_scan_64(KdaScanParams p);
extern "C" __global__ void kda_scan_128(KdaScanParams p);
static_assert(offsetof(KdaScanParams, batch) == 0 && offsetof(KdaScanParams, workspace) == 8
              && offsetof(KdaScanParams, operators) == 16 && offsetof(KdaScanParams, states) == 24
              && offsetof(KdaScanParams, output) == 32 && offsetof(KdaScanParams, input) == 40
              && offsetof(KdaScanParams, conv_states) == 48 && offsetof(KdaScanParams, key_heads) == 56
              && offsetof(KdaScanParams, heads) == 60 && offsetof(KdaScanParams, key_width) == 64
              && offsetof(KdaScanParams, value_width) == 68 && offsetof(KdaScanParams, form) == 72);
extern "C" __global__ void kda_operators_32(KdaSplitsParams p);
extern "C" __global__ void kda_operators_64(KdaSplitsParams p);
extern "C" __global__ void kda_operators_128(KdaSplitsParams p);
extern "C" __global__ void kda_seeds_32(KdaSplitsParams p);
extern "C" __global__ void kda_seeds_64(KdaSplitsParams p);
extern "C" __global__ void kda_seeds_128(KdaSplitsParams p);
static_assert(offsetof(KdaSplitsParams, batch) == 0 && offsetof(KdaSplitsParams, workspace) == 8
              && offsetof(KdaSplitsParams, operators) == 16 && offsetof(KdaSplitsParams, states) == 24
              && offsetof(KdaSplitsParams, heads) == 32 && offsetof(KdaSplitsParams, key_width) == 36
              && offsetof(KdaSplitsParams, value_width) == 40);
extern "C" __global__ void kda_step(KdaStepParams p);
static_assert(offsetof(KdaStepParams, batch) == 0 && offsetof(KdaStepParams, qkv) == 8
              && offsetof(KdaStepParams, gates) == 16 && offsetof(KdaStepParams, beta) == 24
              && offsetof(KdaStepParams, states) == 32 && offsetof(KdaStepParams, output) == 40
              && offsetof(KdaStepParams, key_heads) == 48 && offsetof(KdaStepParams, heads) == 52
              && offsetof(KdaStepParams, key_width) == 56 && offsetof(KdaStepParams, value_width) == 60
              && offsetof(KdaStepParams, form) == 64);
extern "C" __global__ void kda_decode(KdaDecodeParams p);
extern "C" __global__ void kda_decode_projected(KdaDecodeParams p);
static_assert(offsetof(KdaDecodeParams, batch) == 0 && offsetof(KdaDecodeParams, input) == 8
              && offsetof(KdaDecodeParams, weight) == 16 && offsetof(KdaDecodeParams, format) == 24
              && offsetof(KdaDecodeParams, conv_states) == 32 && offsetof(KdaDecodeParams, decay) == 40
              && offsetof(KdaDecodeParams, decay_rank) == 48 && offsetof(KdaDecodeParams, decay_up) == 56
              && offsetof(KdaDecodeParams, write) == 64 && offsetof(KdaDecodeParams, a_log) == 72
              && offsetof(KdaDecodeParams, a_log_format) == 80 && offsetof(KdaDecodeParams, dt_bias) == 88
              && offsetof(KdaDecodeParams, dt_bias_format) == 96 && offsetof(KdaDecodeParams, gate) == 104
              && offsetof(KdaDecodeParams, gate_rank) == 112 && offsetof(KdaDecodeParams, gate_up) == 120
              && offsetof(KdaDecodeParams, rank) == 128 && offsetof(KdaDecodeParams, norm) == 136
              && offsetof(KdaDecodeParams, norm_format) == 144 && offsetof(KdaDecodeParams, eps) == 148
              && offsetof(KdaDecodeParams, states) == 152 && offsetof(KdaDecodeParams, output) == 160
              && offsetof(KdaDecodeParams, heads) == 168 && offsetof(KdaDecodeParams, key_width) == 172
              && offsetof(KdaDecodeParams, value_width) == 176);
#endif
