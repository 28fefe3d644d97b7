// Generated from `src/backend/cuda/params/experts.rs`.

#pragma once

// The router's scores and choice.
struct RouteParams {
    const u32* batch;               // the batch
    const bf16* input;              // [T, width]
    const void* weight;             // [experts, width] of the format
    u32 format;                     // the weight's format
    const void* bias;               // [experts] of its format
    u32 bias_format;                // the bias's format
    float* scores;                  // [T, experts], before the sigmoid
    u32* finished;                  // one word, 0 between launches: route_one counts its blocks
    u32* ids;                       // [T, top_k]: best biased score first
    float* weights;                 // [T, top_k]: sigmoids without the bias; all NaN if a biased score is not finite
    u32 width;                      // elements per row of the input
    u32 experts;                    // number of experts
    u32 top_k;                      // choices per token
    u32 groups;                     // groups of experts
    u32 top_groups;                 // groups that experts are chosen from
    u32 renormalize;                // whether a token's weights are divided by their sum + 1e-20
    float scale;                    // factor of the weights
    u32 all;                        // route_scores: whether all rows are scored, else those of single tokens
};
static_assert(sizeof(RouteParams) == 112);

// Lists of assignments by expert. An assignment is a token's choice of an expert: token * top_k + choice.
struct ExpertsGroupParams {
    const u32* batch;               // the batch
    const u32* ids;                 // [T, top_k]
    u32* counts;                    // [shares, experts]: assignments of each share to each expert; null in experts_list
    u32* groups;                    // number of runs; [most_tiles, 3]: expert, first assignment, number of assignments; then the assignments
    u32 most_tiles;                 // maximum number of runs: tiles, or experts in experts_list
    u32 top_k;                      // choices per token
    u32 first_expert;               // id of the first local expert
    u32 experts;                    // number of local experts
};
static_assert(sizeof(ExpertsGroupParams) == 48);

// `hidden = silu(gate x) * (up x)` for rows of single tokens.
struct ExpertsFewInParams {
    const u32* batch;               // the batch
    const u32* ids;                 // [T, top_k]
    const u32* list;                // from experts_list, if there are several single rows
    u32 most;                       // maximum number of experts in the list
    const bf16* input;              // [T, width]
    const void* gate;               // [experts, hidden_width, width]: bf16, or blocks of its format
    u32 gate_format;                // the gate's format, for blocks
    const void* up;                 // [experts, hidden_width, width]: bf16, or blocks of its format
    u32 up_format;                  // up's format, for blocks
    const bf16* shared;             // [2, hidden_width, width]: gate and up of the shared experts, or null; not for blocks
    bf16* hidden;                   // [T, top_k, hidden_width]
    bf16* shared_hidden;            // [T, hidden_width], or null
    u32 width;                      // elements per row of the input
    u32 hidden_width;               // elements per row of the hidden activations
    u32 top_k;                      // choices per token
    u32 first_expert;               // id of the first local expert
    u32 experts;                    // number of local experts
};
static_assert(sizeof(ExpertsFewInParams) == 120);

// `results = down hidden` for rows of single tokens.
struct ExpertsFewOutParams {
    const u32* batch;               // the batch
    const u32* ids;                 // [T, top_k]
    const u32* list;                // from experts_list, if there are several single rows
    u32 most;                       // maximum number of experts in the list
    const bf16* hidden;             // [T, top_k, hidden_width]
    const void* down;               // [experts, width, hidden_width]: bf16, or blocks of its format
    u32 format;                     // down's format, for blocks
    const bf16* shared;             // [width, hidden_width]: down of the shared experts, or null; not for blocks
    float* results;                 // [T, top_k, width]
    const bf16* shared_hidden;      // [T, hidden_width], or null
    bf16* shared_output;            // [T, width], or null
    u32 width;                      // elements per row of the results
    u32 hidden_width;               // elements per row of the hidden activations
    u32 top_k;                      // choices per token
    u32 first_expert;               // id of the first local expert
    u32 experts;                    // number of local experts
};
static_assert(sizeof(ExpertsFewOutParams) == 112);

// `hidden = silu(gate x) * (up x)` for tiles of assignments of longer segments.
struct ExpertsManyInParams {
    const u32* groups;              // from experts_group
    u32 most_tiles;                 // maximum number of tiles in groups
    const bf16* input;              // [T, width]
    const void* gate;               // [experts, hidden_width, width]: bf16, or blocks of its format
    u32 gate_format;                // the gate's format, for blocks
    const void* up;                 // [experts, hidden_width, width]: bf16, or blocks of its format
    u32 up_format;                  // up's format, for blocks
    bf16* hidden;                   // [T, top_k, hidden_width]
    u32 width;                      // elements per row of the input
    u32 hidden_width;               // elements per row of the hidden activations
    u32 top_k;                      // choices per token
};
static_assert(sizeof(ExpertsManyInParams) == 80);

// `results = down hidden` for tiles of assignments of longer segments.
struct ExpertsManyOutParams {
    const u32* groups;              // from experts_group
    u32 most_tiles;                 // maximum number of tiles in groups
    const bf16* hidden;             // [T, top_k, hidden_width]
    const void* down;               // [experts, width, hidden_width]: bf16, or blocks of its format
    u32 format;                     // down's format, for blocks
    float* results;                 // [T, top_k, width]
    u32 width;                      // elements per row of the results
    u32 hidden_width;               // elements per row of the hidden activations
};
static_assert(sizeof(ExpertsManyOutParams) == 56);

// The sum of a token's experts; in `experts_combine_norm` also the residual sum `target += output` and its norm.
struct ExpertsCombineParams {
    const u32* batch;               // the batch
    const u32* ids;                 // [T, top_k]
    const float* weights;           // [T, top_k]
    const float* results;           // [T, top_k, width]
    const bf16* shared;             // [T, width]: what is added to the sum, or null
    bf16* output;                   // [T, width]
    u32 width;                      // elements per row
    u32 top_k;                      // choices per token
    u32 first_expert;               // id of the first local expert
    u32 experts;                    // number of local experts
    bf16* target;                   // [T, width]; null without the norm, like norm and normed
    const void* norm;               // [width] of the format
    u32 format;                     // the norm's format
    bf16* normed;                   // [T, width]
    float eps;                      // added to the mean of squares
};
static_assert(sizeof(ExpertsCombineParams) == 104);

// Checked by the host's compiler: the struct of each entry point, and offsets, for which
// NVRTC has no function.
#ifndef __CUDACC__
extern "C" __global__ void route_scores(RouteParams p);
extern "C" __global__ void route_choose(RouteParams p);
extern "C" __global__ void route_one(RouteParams p);
static_assert(offsetof(RouteParams, batch) == 0 && offsetof(RouteParams, input) == 8
              && offsetof(RouteParams, weight) == 16 && offsetof(RouteParams, format) == 24
              && offsetof(RouteParams, bias) == 32 && offsetof(RouteParams, bias_format) == 40
              && offsetof(RouteParams, scores) == 48 && offsetof(RouteParams, finished) == 56
              && offsetof(RouteParams, ids) == 64 && offsetof(RouteParams, weights) == 72
              && offsetof(RouteParams, width) == 80 && offsetof(RouteParams, experts) == 84
              && offsetof(RouteParams, top_k) == 88 && offsetof(RouteParams, groups) == 92
              && offsetof(RouteParams, top_groups) == 96 && offsetof(RouteParams, renormalize) == 100
              && offsetof(RouteParams, scale) == 104 && offsetof(RouteParams, all) == 108);
extern "C" __global__ void experts_count(ExpertsGroupParams p);
extern "C" __global__ void experts_group(ExpertsGroupParams p);
extern "C" __global__ void experts_list(ExpertsGroupParams p);
static_assert(offsetof(ExpertsGroupParams, batch) == 0 && offsetof(ExpertsGroupParams, ids) == 8
              && offsetof(ExpertsGroupParams, counts) == 16 && offsetof(ExpertsGroupParams, groups) == 24
              && offsetof(ExpertsGroupParams, most_tiles) == 32 && offsetof(ExpertsGroupParams, top_k) == 36
              && offsetof(ExpertsGroupParams, first_expert) == 40 && offsetof(ExpertsGroupParams, experts) == 44);
extern "C" __global__ void experts_few_in(ExpertsFewInParams p);
extern "C" __global__ void experts_few_in_blocks(ExpertsFewInParams p);
static_assert(offsetof(ExpertsFewInParams, batch) == 0 && offsetof(ExpertsFewInParams, ids) == 8
              && offsetof(ExpertsFewInParams, list) == 16 && offsetof(ExpertsFewInParams, most) == 24
              && offsetof(ExpertsFewInParams, input) == 32 && offsetof(ExpertsFewInParams, gate) == 40
              && offsetof(ExpertsFewInParams, gate_format) == 48 && offsetof(ExpertsFewInParams, up) == 56
              && offsetof(ExpertsFewInParams, up_format) == 64 && offsetof(ExpertsFewInParams, shared) == 72
              && offsetof(ExpertsFewInParams, hidden) == 80 && offsetof(ExpertsFewInParams, shared_hidden) == 88
              && offsetof(ExpertsFewInParams, width) == 96 && offsetof(ExpertsFewInParams, hidden_width) == 100
              && offsetof(ExpertsFewInParams, top_k) == 104 && offsetof(ExpertsFewInParams, first_expert) == 108
              && offsetof(ExpertsFewInParams, experts) == 112);
extern "C" __global__ void experts_few_out(ExpertsFewOutParams p);
extern "C" __global__ void experts_few_out_blocks(ExpertsFewOutParams p);
static_assert(offsetof(ExpertsFewOutParams, batch) == 0 && offsetof(ExpertsFewOutParams, ids) == 8
              && offsetof(ExpertsFewOutParams, list) == 16 && offsetof(ExpertsFewOutParams, most) == 24
              && offsetof(ExpertsFewOutParams, hidden) == 32 && offsetof(ExpertsFewOutParams, down) == 40
              && offsetof(ExpertsFewOutParams, format) == 48 && offsetof(ExpertsFewOutParams, shared) == 56
              && offsetof(ExpertsFewOutParams, results) == 64 && offsetof(ExpertsFewOutParams, shared_hidden) == 72
              && offsetof(ExpertsFewOutParams, shared_output) == 80 && offsetof(ExpertsFewOutParams, width) == 88
              && offsetof(ExpertsFewOutParams, hidden_width) == 92 && offsetof(ExpertsFewOutParams, top_k) == 96
              && offsetof(ExpertsFewOutParams, first_expert) == 100 && offsetof(ExpertsFewOutParams, experts) == 104);
extern "C" __global__ void experts_many_in(ExpertsManyInParams p);
extern "C" __global__ void experts_many_in_blocks(ExpertsManyInParams p);
static_assert(offsetof(ExpertsManyInParams, groups) == 0 && offsetof(ExpertsManyInParams, most_tiles) == 8
              && offsetof(ExpertsManyInParams, input) == 16 && offsetof(ExpertsManyInParams, gate) == 24
              && offsetof(ExpertsManyInParams, gate_format) == 32 && offsetof(ExpertsManyInParams, up) == 40
              && offsetof(ExpertsManyInParams, up_format) == 48 && offsetof(ExpertsManyInParams, hidden) == 56
              && offsetof(ExpertsManyInParams, width) == 64 && offsetof(ExpertsManyInParams, hidden_width) == 68
              && offsetof(ExpertsManyInParams, top_k) == 72);
extern "C" __global__ void experts_many_out(ExpertsManyOutParams p);
extern "C" __global__ void experts_many_out_blocks(ExpertsManyOutParams p);
static_assert(offsetof(ExpertsManyOutParams, groups) == 0 && offsetof(ExpertsManyOutParams, most_tiles) == 8
              && offsetof(ExpertsManyOutParams, hidden) == 16 && offsetof(ExpertsManyOutParams, down) == 24
              && offsetof(ExpertsManyOutParams, format) == 32 && offsetof(ExpertsManyOutParams, results) == 40
              && offsetof(ExpertsManyOutParams, width) == 48 && offsetof(ExpertsManyOutParams, hidden_width) == 52);
extern "C" __global__ void experts_combine(ExpertsCombineParams p);
extern "C" __global__ void experts_combine_norm(ExpertsCombineParams p);
static_assert(offsetof(ExpertsCombineParams, batch) == 0 && offsetof(ExpertsCombineParams, ids) == 8
              && offsetof(ExpertsCombineParams, weights) == 16 && offsetof(ExpertsCombineParams, results) == 24
              && offsetof(ExpertsCombineParams, shared) == 32 && offsetof(ExpertsCombineParams, output) == 40
              && offsetof(ExpertsCombineParams, width) == 48 && offsetof(ExpertsCombineParams, top_k) == 52
              && offsetof(ExpertsCombineParams, first_expert) == 56 && offsetof(ExpertsCombineParams, experts) == 60
              && offsetof(ExpertsCombineParams, target) == 64 && offsetof(ExpertsCombineParams, norm) == 72
              && offsetof(ExpertsCombineParams, format) == 80 && offsetof(ExpertsCombineParams, normed) == 88
              && offsetof(ExpertsCombineParams, eps) == 96);
#endif
