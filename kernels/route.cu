// The router (DeepSeek-V3, arXiv 2412.19437, section 2.1.2): sigmoid scores, a bias that steers the choice and nothing
// else, and choice limited to the best groups of experts. Twin of src/backend/cpu/route.rs.
#include "shared/kernel.h"
#include "shared/batch.h"
#include "shared/best.h"
#include "shared/weight.h"

// Tokens a block takes together, so that each weight is read once for all of them.
#define TOGETHER 8

// scores = sigmoid(weight input) in f32; blockIdx.y counts eights of tokens, a warp has one expert, eight warps a block.
//   batch   the batch
//   input   [T, width] bf16
//   weight  [experts, width] of the format
//   scores  [T, experts] f32
extern "C" __global__ void __launch_bounds__(256) route_scores(
    const u32* batch, const bf16* input, const void* weight, u32 format, float* scores, u32 width, u32 experts) {
    u32 expert = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    u32 first = blockIdx.y * TOGETHER, tokens = batch[TOKENS];
    if (expert >= experts || first >= tokens) return;
    float sums[TOGETHER];
#pragma unroll
    for (u32 t = 0; t < TOGETHER; t++) sums[t] = 0.0f;
    for (u32 i = lane * 8; i < width; i += 256) {
        float w[8];
        weights_at(weight, format, (u64)expert * width + i, width, i, w);
#pragma unroll
        for (u32 t = 0; t < TOGETHER; t++) {
            if (first + t >= tokens) continue;
            float x[8];
            weights_at(input, FORMAT_BF16, (u64)(first + t) * width + i, width, i, x);
#pragma unroll
            for (u32 j = 0; j < 8; j++) sums[t] = fmaf(w[j], x[j], sums[t]);
        }
    }
#pragma unroll
    for (u32 t = 0; t < TOGETHER; t++) {
        float sum = warp_sum(sums[t]);
        if (lane == 0 && first + t < tokens) scores[(u64)(first + t) * experts + expert] = sigmoid(sum);
    }
}
ENTRY(route_scores)

// Which experts, and with what weights; a warp a token.
//   batch    the batch
//   scores   [T, experts] f32
//   bias     [experts] of the format
//   ids      [T, top_k] u32: best biased score first
//   weights  [T, top_k] f32: scores without the bias, divided by their sum + 1e-20 if `renormalize`, times `scale`;
//            all NaN where a biased score is not finite
// Dynamic shared memory: 8 bytes an expert and a group.
extern "C" __global__ void __launch_bounds__(32) route_choose(
    const u32* batch, const float* scores, const void* bias, u32 format, u32* ids, float* weights, u32 experts, u32 top_k,
    u32 groups, u32 top_groups, u32 renormalize, float scale) {
    u64* biased = (u64*)dynamic_shared();
    u64* worth = biased + experts;
    u32 t = blockIdx.x, lane = threadIdx.x;
    if (t >= batch[TOKENS]) return;
    scores += (u64)t * experts;
    ids += (u64)t * top_k;
    weights += (u64)t * top_k;
    int damaged = 0;
    for (u32 e = lane; e < experts; e += 32) {
        float score = scores[e] + weight_at(bias, format, e);
        damaged |= !(fabsf(score) < INFINITE);
        biased[e] = ranked(score, e);
    }
    if (__any_sync(EVERY_LANE, damaged)) {
        for (u32 i = lane; i < top_k; i += 32) {
            ids[i] = 0;
            weights[i] = NOT_A_NUMBER;
        }
        return;
    }
    __syncwarp();
    if (top_groups < groups) {
        u32 size = experts / groups;
        for (u32 g = lane; g < groups; g += 32) {
            u64 best = 0, second = 0;
            for (u32 e = g * size; e < (g + 1) * size; e++) {
                u64 rank = biased[e];
                if (rank > best) {
                    second = best;
                    best = rank;
                } else if (rank > second) {
                    second = rank;
                }
            }
            // Groups count by the sum of their two best biased scores.
            u32 a = ranked_id(best);
            float sum = scores[a] + weight_at(bias, format, a);
            if (second != 0) {
                u32 b = ranked_id(second);
                sum += scores[b] + weight_at(bias, format, b);
            }
            worth[g] = ranked(sum, g);
        }
        __syncwarp();
        for (u32 round = 0; round < top_groups; round++) {
            u64 best = 0;
            for (u32 g = lane; g < groups; g += 32) best = max(best, worth[g]);
            best = warp_best(best);
            // Chosen: no rank has the value 1.
            if (lane == 0) worth[ranked_id(best)] = 1;
            __syncwarp();
        }
        for (u32 e = lane; e < experts; e += 32) {
            if (worth[e / size] != 1) biased[e] = 0;
        }
        __syncwarp();
    }
    float sum = 0.0f;
    for (u32 i = 0; i < top_k; i++) {
        u64 best = 0;
        for (u32 e = lane; e < experts; e += 32) best = max(best, biased[e]);
        best = warp_best(best);
        u32 expert = ranked_id(best);
        float score = scores[expert];
        sum += score;
        if (lane == 0) {
            biased[expert] = 0;
            ids[i] = expert;
            weights[i] = score;
        }
        __syncwarp();
    }
    float factor = renormalize ? scale / (sum + 1e-20f) : scale;
    for (u32 i = lane; i < top_k; i += 32) weights[i] *= factor;
}
ENTRY(route_choose)
