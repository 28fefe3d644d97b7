// The sum of a token's experts, routed and shared, and what may follow it. Part of `experts.cu`.
#include "shared/kernel.h"
#include "shared/batch.h"
#include "shared/norm.h"
#include "shared/params_experts.h"

// Choices whose results are loaded at the same time.
#define COMBINED 8

// Four columns of a row's output. WHOLE: rows have a multiple of four columns. The sum is rounded before the shared experts'
// result is added, as if that were an operation of its own.
template <bool WHOLE>
static __device__ __forceinline__ void combine(
    const u32* ids, const float* weights, const float* results, const bf16* shared, bf16* output, u32 column, u32 width,
    u32 top_k, u32 first, u32 experts) {
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (u32 begin = 0; begin < top_k; begin += COMBINED) {
        float parts[COMBINED][4], shares[COMBINED];
        bool here[COMBINED];
#pragma unroll
        for (u32 i = 0; i < COMBINED; i++) {
            here[i] = begin + i < top_k && ids[begin + i] - first < experts;
            shares[i] = here[i] ? weights[begin + i] : 0.0f;
        }
#pragma unroll
        for (u32 i = 0; i < COMBINED; i++) {
            const float* from = results + (u64)(begin + i) * width + column;
            if constexpr (WHOLE) {
                float4 four = here[i] ? *(const float4*)from : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                parts[i][0] = four.x, parts[i][1] = four.y, parts[i][2] = four.z, parts[i][3] = four.w;
            } else {
#pragma unroll
                for (u32 j = 0; j < 4; j++) parts[i][j] = here[i] && column + j < width ? from[j] : 0.0f;
            }
        }
#pragma unroll
        for (u32 i = 0; i < COMBINED; i++) {
#pragma unroll
            for (u32 j = 0; j < 4; j++) sums[j] = here[i] ? fmaf(shares[i], parts[i][j], sums[j]) : sums[j];
        }
    }
    u32 pairs[2] = {narrow_pair(sums[0], sums[1]), narrow_pair(sums[2], sums[3])};
    if constexpr (WHOLE) {
        if (shared != nullptr) {
            uint2 more = *(const uint2*)(shared + column);
            pairs[0] = narrow_pair(low(pairs[0]) + low(more.x), high(pairs[0]) + high(more.x));
            pairs[1] = narrow_pair(low(pairs[1]) + low(more.y), high(pairs[1]) + high(more.y));
        }
        *(uint2*)(output + column) = make_uint2(pairs[0], pairs[1]);
    } else {
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            if (column + j >= width) continue;
            bf16 sum = narrow(sums[j]);
            output[column + j] = shared != nullptr ? narrow(widen(sum) + widen(shared[column + j])) : sum;
        }
    }
}

// Four columns of row `row` from column `column` on.
static __device__ __forceinline__ void combine_four(const ExpertsCombineParams& p, u64 row, u32 column) {
    const u32* ids = p.ids + row * p.top_k;
    const float *weights = p.weights + row * p.top_k, *results = p.results + row * p.top_k * p.width;
    const bf16* shared = p.shared != nullptr ? p.shared + row * p.width : nullptr;
    bf16* output = p.output + row * p.width;
    if (p.width % 4 == 0) {
        combine<true>(ids, weights, results, shared, output, column, p.width, p.top_k, p.first_expert, p.experts);
    } else {
        combine<false>(ids, weights, results, shared, output, column, p.width, p.top_k, p.first_expert, p.experts);
    }
}

// output = sum over choices of weight * result, in the order of the choices, plus the result of shared experts. Grid (rows,
// ceil(width / 1024)), block 256; a thread has four columns.
extern "C" __global__ void __launch_bounds__(256) experts_combine(const ExpertsCombineParams p) {
    grid_dependency_synchronize();
    u32 column = (blockIdx.y * 256 + threadIdx.x) * 4;
    if (blockIdx.x >= p.batch[TOKENS] || column >= p.width) return;
    combine_four(p, blockIdx.x, column);
}
ENTRY(experts_combine)

// The same, then the residual sum target += output, then its norm, with the bits of `add_norm`. Grid (rows), block 256.
extern "C" __global__ void __launch_bounds__(256) experts_combine_norm(const __grid_constant__ ExpertsCombineParams p) {
    grid_dependency_synchronize();
    SHARED(float, scratch, 32);
    if (blockIdx.x >= p.batch[TOKENS]) return;
    for (u32 column = threadIdx.x * 4; column < p.width; column += 1024) {
        combine_four(p, blockIdx.x, column);
    }
    // The sum divides the columns differently among the threads.
    __syncthreads();
    u64 at = (u64)blockIdx.x * p.width;
    add_normalise(p.output + at, p.target + at, p.norm, p.format, p.normed + at, p.width, p.eps, scratch);
}
ENTRY(experts_combine_norm)
