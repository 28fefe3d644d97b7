// Generated from `src/backend/cuda/params/mla.rs`.

#pragma once

// Writes to the latent cache.
struct MlaAppendParams {
    const u32* batch;               // the batch
    const bf16* input;              // [T, latent + rope]
    const void* weight;             // [latent] of the format
    u32 format;                     // the weight's format
    void* latents;                  // [blocks, block_tokens, latent + rope] of the entry's type
    u32 latent;                     // elements of a latent
    u32 rope;                       // elements of a shared key
    u32 block_tokens;               // tokens per block
    float eps;                      // added to the mean of squares
};
static_assert(sizeof(MlaAppendParams) == 56);

// Attention of many queries to one window of positions. P and Q are the maximum widths of key and value of
// `mla_images` and `mla_prefill`.
struct MlaPrefillParams {
    const u32* batch;               // the batch
    u32 window;                     // index of the window
    const bf16* query;              // [T, heads (nope + rope)], aligned to 16 bytes
    const void* latents;            // [blocks, block_tokens, latent + rope] of the entry's type
    bf16* gathered;                 // [positions, latent]: the window's latents
    const float* expanded;          // [positions, heads (nope + value)]: the window's latents times kv_b
    bf16* images;                   // [runs, heads, 64 (P + Q) + 8] halves, aligned to 16 bytes
    bf16* output;                   // [T, heads value]
    float* marks;                   // [T, heads, 2]: greatest score and sum for the next window; unused if each sequence has one window, like partial
    float* partial;                 // [T, heads, value]: the output's sum for the next window
    u32 heads;                      // number of heads
    u32 latent;                     // elements of a latent
    u32 nope;                       // elements of a key without position
    u32 rope;                       // elements of a shared key
    u32 value;                      // elements of a value
    u32 block_tokens;               // tokens per block
};
static_assert(sizeof(MlaPrefillParams) == 104);

// Attention of few queries in the absorbed form.
struct MlaDecodeParams {
    const u32* batch;               // the batch
    u32 single;                     // whether rows are those of single tokens, whose spans are the batch's; else each row has one span
    u32 rows;                       // number of rows
    const bf16* query;              // [T, heads (nope + rope)]
    const void* kv_b;               // [heads (nope + value), latent] of the format
    u32 format;                     // the format of kv_b
    float* absorbed;                // [rows, heads, latent]
    const void* latents;            // [blocks, block_tokens, latent + rope] of the entry's type, aligned to 16 bytes
    float* parts;                   // [spans, heads, 4 ceil(latent / 4) + 4]: weighted latent, then greatest score, sum of weights
    bf16* output;                   // [T, heads value]
    u32 heads;                      // number of heads
    u32 latent;                     // elements of a latent, at most 512
    u32 nope;                       // elements of a key without position, at most 256
    u32 rope;                       // elements of a shared key, at most 64
    u32 value;                      // elements of a value
    u32 block_tokens;               // tokens per block
};
static_assert(sizeof(MlaDecodeParams) == 96);

// Checked by the host's compiler: the struct of each entry point, and offsets, for which
// NVRTC has no function.
#ifndef __CUDACC__
extern "C" __global__ void mla_append(MlaAppendParams p);
extern "C" __global__ void mla_append_f16(MlaAppendParams p);
extern "C" __global__ void mla_append_f32(MlaAppendParams p);
static_assert(offsetof(MlaAppendParams, batch) == 0 && offsetof(MlaAppendParams, input) == 8
              && offsetof(MlaAppendParams, weight) == 16 && offsetof(MlaAppendParams, format) == 24
              && offsetof(MlaAppendParams, latents) == 32 && offsetof(MlaAppendParams, latent) == 40
              && offsetof(MlaAppendParams, rope) == 44 && offsetof(MlaAppendParams, block_tokens) == 48
              && offsetof(MlaAppendParams, eps) == 52);
extern "C" __global__ void mla_gather(MlaPrefillParams p);
extern "C" __global__ void mla_gather_f16(MlaPrefillParams p);
extern "C" __global__ void mla_gather_f32(MlaPrefillParams p);
extern "C" __global__ void mla_images_64(MlaPrefillParams p);
extern "C" __global__ void mla_images_64_f16(MlaPrefillParams p);
extern "C" __global__ void mla_images_64_f32(MlaPrefillParams p);
extern "C" __global__ void mla_images_192(MlaPrefillParams p);
extern "C" __global__ void mla_images_192_f16(MlaPrefillParams p);
extern "C" __global__ void mla_images_192_f32(MlaPrefillParams p);
extern "C" __global__ void mla_prefill_64(MlaPrefillParams p);
extern "C" __global__ void mla_prefill_192(MlaPrefillParams p);
static_assert(offsetof(MlaPrefillParams, batch) == 0 && offsetof(MlaPrefillParams, window) == 8
              && offsetof(MlaPrefillParams, query) == 16 && offsetof(MlaPrefillParams, latents) == 24
              && offsetof(MlaPrefillParams, gathered) == 32 && offsetof(MlaPrefillParams, expanded) == 40
              && offsetof(MlaPrefillParams, images) == 48 && offsetof(MlaPrefillParams, output) == 56
              && offsetof(MlaPrefillParams, marks) == 64 && offsetof(MlaPrefillParams, partial) == 72
              && offsetof(MlaPrefillParams, heads) == 80 && offsetof(MlaPrefillParams, latent) == 84
              && offsetof(MlaPrefillParams, nope) == 88 && offsetof(MlaPrefillParams, rope) == 92
              && offsetof(MlaPrefillParams, value) == 96 && offsetof(MlaPrefillParams, block_tokens) == 100);
extern "C" __global__ void mla_absorb(MlaDecodeParams p);
extern "C" __global__ void mla_attend(MlaDecodeParams p);
extern "C" __global__ void mla_attend_f16(MlaDecodeParams p);
extern "C" __global__ void mla_attend_f32(MlaDecodeParams p);
extern "C" __global__ void mla_attend_512(MlaDecodeParams p);
extern "C" __global__ void mla_attend_512_f16(MlaDecodeParams p);
extern "C" __global__ void mla_attend_512_f32(MlaDecodeParams p);
extern "C" __global__ void mla_merge(MlaDecodeParams p);
static_assert(offsetof(MlaDecodeParams, batch) == 0 && offsetof(MlaDecodeParams, single) == 8
              && offsetof(MlaDecodeParams, rows) == 12 && offsetof(MlaDecodeParams, query) == 16
              && offsetof(MlaDecodeParams, kv_b) == 24 && offsetof(MlaDecodeParams, format) == 32
              && offsetof(MlaDecodeParams, absorbed) == 40 && offsetof(MlaDecodeParams, latents) == 48
              && offsetof(MlaDecodeParams, parts) == 56 && offsetof(MlaDecodeParams, output) == 64
              && offsetof(MlaDecodeParams, heads) == 72 && offsetof(MlaDecodeParams, latent) == 76
              && offsetof(MlaDecodeParams, nope) == 80 && offsetof(MlaDecodeParams, rope) == 84
              && offsetof(MlaDecodeParams, value) == 88 && offsetof(MlaDecodeParams, block_tokens) == 92);
#endif
