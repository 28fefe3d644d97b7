// Generated from `src/backend/cuda/params/rows.rs`.

#pragma once

// `target += source`, over rows of bf16, or of f32 in `add_f32`.
struct AddParams {
    const u32* batch;               // the batch
    u32 rows;                       // the word of the batch that counts the rows: TOKENS or OUTPUTS
    const void* source;             // [.., width] of the entry's type
    void* target;                   // [.., width] of the entry's type
    u32 width;                      // elements per row
};
static_assert(sizeof(AddParams) == 40);

// `target += source`, and `output` is the norm of the sum.
struct AddNormParams {
    const u32* batch;               // the batch
    u32 rows;                       // the word of the batch that counts the rows: TOKENS or OUTPUTS
    const bf16* source;             // [.., width]
    bf16* target;                   // [.., width]
    const void* weight;             // [width] of the format
    u32 format;                     // the weight's format
    bf16* output;                   // [.., width]
    u32 width;                      // elements per row
    float eps;                      // added to the mean of squares
};
static_assert(sizeof(AddNormParams) == 64);

// A weight in bf16.
struct ConvertParams {
    const void* weight;             // [count] of the format
    u32 format;                     // the weight's format
    bf16* output;                   // [..]: elements first to first + count are written
    u64 first;                      // the first element that is written
    u64 count;                      // number of elements
};
static_assert(sizeof(ConvertParams) == 40);

// One row of the weight per token.
struct EmbedParams {
    const u32* batch;               // the batch
    const u32* drawn;               // [draws, 2]: the tokens that the submission before drew, and their logits; null if no token is fed
    const void* weight;             // [vocabulary, width] of the format
    u32 format;                     // the weight's format
    bf16* output;                   // [T, width]
    u32 vocabulary;                 // rows of the weight
    u32 width;                      // elements per row
};
static_assert(sizeof(EmbedParams) == 48);

// Random numbers.
struct FillParams {
    void* output;                   // [count] of the format
    u32 format;                     // F32, F16 or BF16
    u64 count;                      // number of elements
    u32 seed;                       // of the numbers
    float mean;                     // of the numbers
    float scale;                    // greatest distance from the mean, a power of two, or 0
};
static_assert(sizeof(FillParams) == 40);

// The norm of rows.
struct RmsNormParams {
    const u32* batch;               // the batch
    u32 rows;                       // the word of the batch that counts the output's rows: TOKENS or OUTPUTS
    u32 gather;                     // 1: the input has a row per token and the output one per output row; 0: row r is read from row r
    const bf16* input;              // [.., width]
    const void* weight;             // [width] of the format
    u32 format;                     // the weight's format
    bf16* output;                   // [.., width]
    u32 width;                      // elements per row
    float eps;                      // added to the mean of squares
};
static_assert(sizeof(RmsNormParams) == 56);

// `output = silu(gate) * up`, where a row of the input is gate, then up.
struct SwigluParams {
    const u32* batch;               // the batch
    u32 rows;                       // the word of the batch that counts the rows: TOKENS or OUTPUTS
    const bf16* input;              // [.., 2 width]
    bf16* output;                   // [.., width]
    u32 width;                      // elements per row of the output
};
static_assert(sizeof(SwigluParams) == 40);

// Some columns of `output = input weight^T`.
struct LinearParams {
    const u32* batch;               // the batch
    u32 rows;                       // the word of the batch that counts the rows: TOKENS, OUTPUTS, or in linear the positions of a window
    const bf16* input;              // [.., columns]
    const void* weight;             // [outputs, columns] of the format
    u32 format;                     // the weight's format
    void* output;                   // [.., width], f32 if full, else bf16: columns first to first + outputs are written
    u32 full;                       // whether the output is f32
    u32 columns;                    // elements per row of the input
    u32 outputs;                    // rows of the weight
    u32 first;                      // the output's column of the weight's first row
    u32 width;                      // elements per row of the output
};
static_assert(sizeof(LinearParams) == 72);

// Up to four products `output = input weight^T`; those that are not there are null and 0.
struct LinearFewParams {
    const u32* batch;               // the batch
    u32 rows;                       // the word of the batch that counts the rows: TOKENS or OUTPUTS
    u32 full;                       // whether outputs are f32, else bf16
    const bf16* input[4];           // [.., columns], aligned to 16 bytes
    const bf16* weight[4];          // [outputs, columns], aligned to 16 bytes
    void* output[4];                // [.., outputs]
    u32 columns[4];                 // elements per row of the input
    u32 outputs[4];                 // rows of the weight
};
static_assert(sizeof(LinearFewParams) == 144);

// The candidates of rows of logits.
struct SelectParams {
    const u32* batch;               // the batch
    const float* logits;            // [O, vocabulary]
    u64* ranks;                     // [O, slices, candidates]: score and id, see best.h; 0 if a slice has no more
    float* sums;                    // [O, slices, 4]: greatest, sum of exponentials, 1 if all are finite, unused
    u32* choices;                   // [O, 4 + 2 candidates] words: log-normaliser, 0, whether all are finite, the target's logit; then id, logit
    u32 vocabulary;                 // logits per row
    u32 candidates;                 // candidates per row
    u32 slices;                     // slices per row
};
static_assert(sizeof(SelectParams) == 56);

// Draws of tokens.
struct SampleParams {
    const u32* batch;               // the batch
    const float* logits;            // [O, vocabulary]
    float* changed;                 // [changed draws, vocabulary]: copies of rows with changes
    u64* best;                      // [draws, slices]: each slice's best token, ranked; 0 if none is allowed
    u64* cells;                     // [draws, 2, 4, 256]: tokens by number and by weight, in each level
    u64* sums;                      // [draws, slices, 2]: the weight of the tokens above the cut, and the number of those at it
    u32* drawn;                     // [draws, 2] words: the token, or NONE if none is allowed; its logit in the row
    u32 vocabulary;                 // logits per row
    u32 slice;                      // logits per slice
    u32 slices;                     // slices per row
    u32 by_weight;                  // sample_narrow: 0 narrows the number of tokens (top_k), 1 their weight (top_p)
    u32 level;                      // sample_narrow: the one of the four levels of eight bits that is counted
};
static_assert(sizeof(SampleParams) == 80);

// Checked by the host's compiler: the struct of each entry point, and offsets, for which
// NVRTC has no function.
#ifndef __CUDACC__
extern "C" __global__ void add(AddParams p);
extern "C" __global__ void add_f32(AddParams p);
static_assert(offsetof(AddParams, batch) == 0 && offsetof(AddParams, rows) == 8 && offsetof(AddParams, source) == 16
              && offsetof(AddParams, target) == 24 && offsetof(AddParams, width) == 32);
extern "C" __global__ void add_norm(AddNormParams p);
static_assert(offsetof(AddNormParams, batch) == 0 && offsetof(AddNormParams, rows) == 8
              && offsetof(AddNormParams, source) == 16 && offsetof(AddNormParams, target) == 24
              && offsetof(AddNormParams, weight) == 32 && offsetof(AddNormParams, format) == 40
              && offsetof(AddNormParams, output) == 48 && offsetof(AddNormParams, width) == 56
              && offsetof(AddNormParams, eps) == 60);
extern "C" __global__ void convert(ConvertParams p);
static_assert(offsetof(ConvertParams, weight) == 0 && offsetof(ConvertParams, format) == 8
              && offsetof(ConvertParams, output) == 16 && offsetof(ConvertParams, first) == 24
              && offsetof(ConvertParams, count) == 32);
extern "C" __global__ void embed(EmbedParams p);
static_assert(offsetof(EmbedParams, batch) == 0 && offsetof(EmbedParams, drawn) == 8
              && offsetof(EmbedParams, weight) == 16 && offsetof(EmbedParams, format) == 24
              && offsetof(EmbedParams, output) == 32 && offsetof(EmbedParams, vocabulary) == 40
              && offsetof(EmbedParams, width) == 44);
extern "C" __global__ void fill(FillParams p);
static_assert(offsetof(FillParams, output) == 0 && offsetof(FillParams, format) == 8
              && offsetof(FillParams, count) == 16 && offsetof(FillParams, seed) == 24
              && offsetof(FillParams, mean) == 28 && offsetof(FillParams, scale) == 32);
extern "C" __global__ void rms_norm(RmsNormParams p);
static_assert(offsetof(RmsNormParams, batch) == 0 && offsetof(RmsNormParams, rows) == 8
              && offsetof(RmsNormParams, gather) == 12 && offsetof(RmsNormParams, input) == 16
              && offsetof(RmsNormParams, weight) == 24 && offsetof(RmsNormParams, format) == 32
              && offsetof(RmsNormParams, output) == 40 && offsetof(RmsNormParams, width) == 48
              && offsetof(RmsNormParams, eps) == 52);
extern "C" __global__ void swiglu(SwigluParams p);
static_assert(offsetof(SwigluParams, batch) == 0 && offsetof(SwigluParams, rows) == 8
              && offsetof(SwigluParams, input) == 16 && offsetof(SwigluParams, output) == 24
              && offsetof(SwigluParams, width) == 32);
extern "C" __global__ void linear(LinearParams p);
extern "C" __global__ void linear_few_blocks(LinearParams p);
extern "C" __global__ void linear_many_blocks(LinearParams p);
static_assert(offsetof(LinearParams, batch) == 0 && offsetof(LinearParams, rows) == 8
              && offsetof(LinearParams, input) == 16 && offsetof(LinearParams, weight) == 24
              && offsetof(LinearParams, format) == 32 && offsetof(LinearParams, output) == 40
              && offsetof(LinearParams, full) == 48 && offsetof(LinearParams, columns) == 52
              && offsetof(LinearParams, outputs) == 56 && offsetof(LinearParams, first) == 60
              && offsetof(LinearParams, width) == 64);
extern "C" __global__ void linear_few_8(LinearFewParams p);
extern "C" __global__ void linear_few_16(LinearFewParams p);
extern "C" __global__ void linear_few_32(LinearFewParams p);
extern "C" __global__ void linear_few_64(LinearFewParams p);
static_assert(offsetof(LinearFewParams, batch) == 0 && offsetof(LinearFewParams, rows) == 8
              && offsetof(LinearFewParams, full) == 12 && offsetof(LinearFewParams, input) == 16
              && offsetof(LinearFewParams, weight) == 48 && offsetof(LinearFewParams, output) == 80
              && offsetof(LinearFewParams, columns) == 112 && offsetof(LinearFewParams, outputs) == 128);
extern "C" __global__ void select_slices(SelectParams p);
extern "C" __global__ void select_merge(SelectParams p);
static_assert(offsetof(SelectParams, batch) == 0 && offsetof(SelectParams, logits) == 8
              && offsetof(SelectParams, ranks) == 16 && offsetof(SelectParams, sums) == 24
              && offsetof(SelectParams, choices) == 32 && offsetof(SelectParams, vocabulary) == 40
              && offsetof(SelectParams, candidates) == 44 && offsetof(SelectParams, slices) == 48);
extern "C" __global__ void sample_change(SampleParams p);
extern "C" __global__ void sample_best(SampleParams p);
extern "C" __global__ void sample_narrow(SampleParams p);
extern "C" __global__ void sample_sum(SampleParams p);
extern "C" __global__ void sample_draw(SampleParams p);
static_assert(offsetof(SampleParams, batch) == 0 && offsetof(SampleParams, logits) == 8
              && offsetof(SampleParams, changed) == 16 && offsetof(SampleParams, best) == 24
              && offsetof(SampleParams, cells) == 32 && offsetof(SampleParams, sums) == 40
              && offsetof(SampleParams, drawn) == 48 && offsetof(SampleParams, vocabulary) == 56
              && offsetof(SampleParams, slice) == 60 && offsetof(SampleParams, slices) == 64
              && offsetof(SampleParams, by_weight) == 68 && offsetof(SampleParams, level) == 72);
#endif
