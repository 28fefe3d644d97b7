// The router (DeepSeek-V3, arXiv 2412.19437, section 2.1.2): sigmoid scores, a bias that affects only the choice, and choice
// limited to the best groups of experts. Counterpart of src/backend/cpu/route.rs.
#include "shared/kernel.h"
#include "shared/batch.h"
#include "shared/best.h"
#include "shared/eights.h"
#include "shared/weight.h"
#include "shared/params_experts.h"

// Rows that a warp computes together, so that each weight is read once for all of them; a warp has one expert.
#define TOGETHER 8
// Groups of 256 columns whose loads are in flight at the same time: nine are a row of the published width.
#define AHEAD_OF_ONE 9
#define AHEAD_OF_SEVERAL 2

// The rows of a kernel: those of the batch's list from `first` on; indices beyond the end repeat the last row.
struct Listed {
    const u32* order;
    u32 count;

    // Rows of single tokens, or all.
    __device__ __forceinline__ Listed(const u32* batch, u32 all) {
        u32 first = all ? 0 : batch[SEVERAL_ROWS];
        order = batch + batch[AT_ROWS] + first;
        count = batch[TOKENS] - first;
    }
    __device__ __forceinline__ u32 row(u32 n) const { return order[min(n, count - 1)]; }
};

// A group of loads of an expert's weights, from column `k` on.
template <u32 FORMAT, u32 AHEAD>
static __device__ __forceinline__ void load_run(Stored<FORMAT> (&w)[AHEAD], const void* weight, u64 row, u32 k, u32 width) {
#pragma unroll
    for (u32 a = 0; a < AHEAD; a++) w[a].load(weight, row + k + 256 * a, k + 256 * a < width);
}

// sums[t] += a group of the expert's weights times row t. Zeros beyond a row's end change no sum, so its bits depend neither
// on AHEAD nor on ROWS.
template <u32 FORMAT, u32 AHEAD, u32 ROWS>
static __device__ __forceinline__ void add_run(
    float (&sums)[ROWS], const Stored<FORMAT> (&w)[AHEAD], const bf16* const (&rows)[ROWS], u32 k, u32 width) {
    uint4 x[AHEAD][ROWS];
#pragma unroll
    for (u32 a = 0; a < AHEAD; a++) {
#pragma unroll
        for (u32 t = 0; t < ROWS; t++) {
            u32 c = k + 256 * a;
            x[a][t] = load_sixteen(rows[t] + c, c < width);
        }
    }
#pragma unroll
    for (u32 a = 0; a < AHEAD; a++) {
#pragma unroll
        for (u32 t = 0; t < ROWS; t++) {
            u32 pairs[4] = {x[a][t].x, x[a][t].y, x[a][t].z, x[a][t].w};
#pragma unroll
            for (u32 j = 0; j < 8; j++) {
                sums[t] = fmaf(w[a].at(j), j % 2 ? high(pairs[j / 2]) : low(pairs[j / 2]), sums[t]);
            }
        }
    }
}

// The products of an expert with up to ROWS rows, over columns from `from` on.
template <u32 FORMAT, u32 AHEAD, u32 ROWS>
static __device__ __forceinline__ void dots(
    float (&sums)[ROWS], const void* weight, u64 row, const bf16* const (&rows)[ROWS], u32 from, u32 width) {
    for (; from < width; from += 256 * AHEAD) {
        u32 k = from + threadIdx.x % 32 * 8;
        Stored<FORMAT> w[AHEAD];
        load_run(w, weight, row, k, width);
        add_run(sums, w, rows, k, width);
    }
}

// The same for rows that are not a multiple of eight columns, or for blocks.
template <u32 ROWS>
static __device__ __forceinline__ void dots_any(
    float (&sums)[ROWS], const void* weight, u32 format, u64 row, const bf16* const (&rows)[ROWS], u32 width) {
    for (u32 k = threadIdx.x % 32; k < width; k += 32) {
        float w = weight_at(weight, format, row + k);
#pragma unroll
        for (u32 t = 0; t < ROWS; t++) sums[t] = fmaf(w, widen(rows[t][k]), sums[t]);
    }
}

// Writes a warp's results for ROWS rows: the sums of all lanes.
template <u32 ROWS>
static __device__ __forceinline__ void store_scores(
    const float (&sums)[ROWS], const Listed& listed, u32 first, float* scores, u32 expert, u32 experts) {
    u32 lane = threadIdx.x % 32;
    float own = 0.0f;
#pragma unroll
    for (u32 t = 0; t < ROWS; t++) {
        float sum = warp_sum(sums[t]);
        if (lane == t) own = sum;
    }
    if (lane < ROWS && first + lane < listed.count) scores[(u64)listed.row(first + lane) * experts + expert] = own;
}

// One expert's score before the sigmoid, of the only row, in every lane of a warp. All its weights are asked for first; without
// the barrier the compiler would ask for each where it is used.
template <u32 FORMAT>
static __device__ __forceinline__ float score_of_one(const bf16* input, const void* weight, u32 width, u32 expert) {
    u32 k = threadIdx.x % 32 * 8;
    u64 row = (u64)expert * width;
    Stored<FORMAT> w[AHEAD_OF_ONE];
    load_run(w, weight, row, k, width);
    __syncwarp();
    const bf16* rows[1] = {input};
    float sums[1] = {0.0f};
    add_run(sums, w, rows, k, width);
    dots<FORMAT, AHEAD_OF_ONE>(sums, weight, row, rows, 256 * AHEAD_OF_ONE, width);
    return warp_sum(sums[0]);
}

// The scores before the sigmoid, for rows that cuBLASLt does not compute: of single tokens, or all if `all`. Grid
// (ceil(experts / warps per block), ceil(rows / TOGETHER)); a warp has one expert.
extern "C" __global__ void __launch_bounds__(256, 2) route_scores(const RouteParams p) {
    grid_dependency_synchronize();
    u32 expert = blockIdx.x * 8 + threadIdx.x / 32, first = blockIdx.y * TOGETHER;
    Listed listed(p.batch, p.all);
    if (expert >= p.experts || first >= listed.count) return;
    const bf16* rows[TOGETHER];
    float sums[TOGETHER];
#pragma unroll
    for (u32 t = 0; t < TOGETHER; t++) {
        rows[t] = p.input + (u64)listed.row(first + t) * p.width;
        sums[t] = 0.0f;
    }
    u64 row = (u64)expert * p.width;
    if (p.width % 8 != 0 || p.format >= FIRST_OF_BLOCKS) {
        dots_any(sums, p.weight, p.format, row, rows, p.width);
    } else if (p.format == FORMAT_BF16) {
        dots<FORMAT_BF16, AHEAD_OF_SEVERAL>(sums, p.weight, row, rows, 0, p.width);
    } else if (p.format == FORMAT_F16) {
        dots<FORMAT_F16, AHEAD_OF_SEVERAL>(sums, p.weight, row, rows, 0, p.width);
    } else {
        dots<FORMAT_F32, AHEAD_OF_SEVERAL>(sums, p.weight, row, rows, 0, p.width);
    }
    store_scores(sums, listed, first, p.scores, expert, p.experts);
}
ENTRY(route_scores)

// Scores and biased ranks of one token's experts, with eight loads per lane in flight; whether any is not finite. `S` is
// volatile if other blocks of the launch wrote the scores.
template <u32 FORMAT, class S>
static __device__ __forceinline__ int rank_experts(
    const S* scores, const void* bias, u32 experts, float* plain, u64* biased) {
    int damaged = 0;
    for (u32 first = threadIdx.x % 32; first < experts; first += 256) {
        float logits[8], biases[8];
#pragma unroll
        for (u32 i = 0; i < 8; i++) {
            u32 e = min(first + 32 * i, experts - 1);
            logits[i] = scores[e];
            biases[i] = weight_at(bias, FORMAT, e);
        }
#pragma unroll
        for (u32 i = 0; i < 8; i++) {
            u32 e = first + 32 * i;
            float score = sigmoid(logits[i]), sum = score + biases[i];
            damaged |= !(fabsf(sum) < INFINITE);
            if (e >= experts) continue;
            plain[e] = score;
            biased[e] = ranked(sum, e);
        }
    }
    return damaged;
}

// Selects a token's experts and their weights, with one warp. Dynamic shared memory: 12 bytes per expert, 8 per group.
template <class S>
static __device__ __forceinline__ void choose(const RouteParams& p, const S* scores, u32* ids, float* weights) {
    const u32 experts = p.experts, top_k = p.top_k, groups = p.groups, top_groups = p.top_groups;
    u64* biased = (u64*)dynamic_shared();
    u64* worth = biased + experts;
    float* plain = (float*)(worth + groups);
    u32 lane = threadIdx.x % 32;
    int damaged = p.bias_format == FORMAT_BF16 ? rank_experts<FORMAT_BF16>(scores, p.bias, experts, plain, biased)
                  : p.bias_format == FORMAT_F16 ? rank_experts<FORMAT_F16>(scores, p.bias, experts, plain, biased)
                                         : rank_experts<FORMAT_F32>(scores, p.bias, experts, plain, biased);
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
            // Groups are compared by the sum of their two best biased scores.
            float sum = ranked_score(best);
            if (second != 0) sum += ranked_score(second);
            worth[g] = ranked(sum, g);
        }
        __syncwarp();
        for (u32 round = 0; round < top_groups; round++) {
            u64 best = 0;
            for (u32 g = lane; g < groups; g += 32) best = max(best, worth[g]);
            best = warp_best(best);
            // Marks it as chosen: no rank has the value 1.
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
        float score = plain[expert];
        sum += score;
        if (lane == 0) {
            biased[expert] = 0;
            ids[i] = expert;
            weights[i] = score;
        }
        __syncwarp();
    }
    float factor = p.renormalize ? p.scale / (sum + 1e-20f) : p.scale;
    for (u32 i = lane; i < top_k; i += 32) weights[i] *= factor;
}

// One warp per token; dynamic shared memory: 12 bytes per expert, 8 per group.
extern "C" __global__ void __launch_bounds__(32) route_choose(const RouteParams p) {
    grid_dependency_synchronize();
    u64 t = blockIdx.x;
    if (t >= p.batch[TOKENS]) return;
    choose(p, p.scores + t * p.experts, p.ids + t * p.top_k, p.weights + t * p.top_k);
}
ENTRY(route_choose)

// Scores and choice of a batch of one token, with the bits of the kernels above. The block that finishes last has the choice:
// `finished` counts the others, and is 0 again at the end. Grid (ceil(experts / 2)), block 64;
// dynamic shared memory as above.
extern "C" __global__ void __launch_bounds__(64) route_one(const RouteParams p) {
    grid_dependency_synchronize();
    SHARED(u32, last, 1);
    u32 expert = blockIdx.x * 2 + threadIdx.x / 32;
    if (expert < p.experts) {
        float score;
        if (p.width % 8 != 0 || p.format >= FIRST_OF_BLOCKS) {
            const bf16* rows[1] = {p.input};
            float sums[1] = {0.0f};
            dots_any(sums, p.weight, p.format, (u64)expert * p.width, rows, p.width);
            score = warp_sum(sums[0]);
        } else if (p.format == FORMAT_BF16) {
            score = score_of_one<FORMAT_BF16>(p.input, p.weight, p.width, expert);
        } else if (p.format == FORMAT_F16) {
            score = score_of_one<FORMAT_F16>(p.input, p.weight, p.width, expert);
        } else {
            score = score_of_one<FORMAT_F32>(p.input, p.weight, p.width, expert);
        }
        if (threadIdx.x % 32 == 0) {
            p.scores[expert] = score;
            __threadfence();
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        u32 before = atomicAdd(p.finished, 1u);
        *last = before + 1 == gridDim.x;
        if (*last) *p.finished = 0;
    }
    __syncthreads();
    if (!*last || threadIdx.x >= 32) return;
    __threadfence();
    choose(p, (const volatile float*)p.scores, p.ids, p.weights);
}
ENTRY(route_one)
