// Products with few rows: those of single tokens and of outputs with weights in bf16, and all rows with weights that are
// stored otherwise. Rows of longer segments with weights in bf16 are cuBLASLt's. Twin of src/backend/cpu/linear.rs.
#include "shared/kernel.h"
#include "shared/batch.h"
#include "shared/eights.h"
#include "shared/weight.h"

// Rows a warp takes together, so that each weight is read once for all of them.
#define TOGETHER 8

// Some columns of output = input weight^T with f32 sums; a warp an output, eight a block; blockIdx.y counts eights of rows.
//   batch   the batch
//   counted the word of the batch that counts the rows: TOKENS, OUTPUTS, or the positions of a window
//   input   [.., columns] bf16
//   weight  [outputs, columns] of the format
//   output  [.., width], f32 if `full`, else bf16: columns from `first_output` on, `outputs` of them, are written
extern "C" __global__ void __launch_bounds__(256) linear(
    const u32* batch, u32 counted, const bf16* input, const void* weight, u32 format, void* output, u32 full, u32 columns,
    u32 outputs, u32 first_output, u32 width) {
    u32 n = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    u32 first = blockIdx.y * TOGETHER, rows = batch[counted];
    if (n >= outputs || first >= rows) return;
    float sums[TOGETHER];
#pragma unroll
    for (u32 r = 0; r < TOGETHER; r++) sums[r] = 0.0f;
    for (u32 i = lane; i < columns; i += 32) {
        float w = weight_at(weight, format, (u64)n * columns + i);
#pragma unroll
        for (u32 r = 0; r < TOGETHER; r++) {
            if (first + r < rows) sums[r] += w * widen(input[(u64)(first + r) * columns + i]);
        }
    }
#pragma unroll
    for (u32 r = 0; r < TOGETHER; r++) {
        float sum = warp_sum(sums[r]);
        if (lane != 0 || first + r >= rows) continue;
        u64 at = (u64)(first + r) * width + first_output + n;
        if (full) {
            ((float*)output)[at] = sum;
        } else {
            ((bf16*)output)[at] = narrow(sum);
        }
    }
}
ENTRY(linear)

// Outputs a block of `linear_few`: two tiles of 16, which share what is read of the input.
#define FEW_OUTPUTS 32
// Its warps take turns along the columns; their sums are added in the warps' order.
#define FEW_WARPS 16
// Columns of a turn: eight a lane, in one access.
#define FEW_COLUMNS 32

// Eight elements of row `r` of a matrix from column `k` on; zeros where there is no row (NONE) or no column.
static __device__ __forceinline__ uint4 eight_of(const bf16* matrix, u32 r, u32 k, u32 columns) {
    if (r == NONE || k >= columns) return make_uint4(0, 0, 0, 0);
    const bf16* at = matrix + (u64)r * columns + k;
    return columns % 8 == 0 ? eight_of<true>(at, k, columns) : eight_of<false>(at, k, columns);
}

// Sums of products do not mind the order of the columns: a lane takes eight that lie together, and calls them the columns
// of a fragment, in the weight and in the input alike. What a row's sum is made of does not depend on other rows.
template <int TILES>
static __device__ __forceinline__ void few(
    const u32* batch, u32 kind, const bf16* input, const bf16* weight, void* output, u32 full, u32 columns, u32 outputs) {
    SHARED(float, parts, FEW_WARPS * FEW_OUTPUTS * 8);
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    u32 several = kind == TOKENS ? batch[SEVERAL_ROWS] : 0, rows = batch[kind] - several;
    const u32* order = kind == TOKENS ? batch + batch[AT_ROWS] + several : nullptr;
    u32 first = blockIdx.y * (8 * TILES), output_first = blockIdx.x * FEW_OUTPUTS;
    if (first >= rows) return;
    auto row_at = [&](u32 n) { return order != nullptr ? order[n] : n; };

    u32 ours[TILES];
#pragma unroll
    for (u32 j = 0; j < TILES; j++) {
        u32 n = first + 8 * j + g;
        ours[j] = n < rows ? row_at(n) : NONE;
    }
    auto weight_of = [&](u32 i, u32 k) {
        u32 n = output_first + 8 * i + g;
        return eight_of(weight, n < outputs ? n : NONE, k, columns);
    };
    float sums[2][TILES][4];
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
#pragma unroll
        for (u32 j = 0; j < TILES; j++) {
#pragma unroll
            for (u32 n = 0; n < 4; n++) sums[i][j][n] = 0.0f;
        }
    }
    // The weight of the next turn is under way while this one is multiplied, where registers are left for it.
    constexpr bool ahead = TILES < 8;
    uint4 next[4];
    u32 k = warp * FEW_COLUMNS + 8 * t;
#pragma unroll
    for (u32 i = 0; i < 4 && ahead; i++) next[i] = weight_of(i, k);
    for (u32 turn = warp; turn * FEW_COLUMNS < columns; turn += FEW_WARPS) {
        uint4 w[4];
#pragma unroll
        for (u32 i = 0; i < 4; i++) w[i] = ahead ? next[i] : weight_of(i, k);
#pragma unroll
        for (u32 i = 0; i < 4 && ahead; i++) next[i] = weight_of(i, k + FEW_WARPS * FEW_COLUMNS);
#pragma unroll
        for (u32 j = 0; j < TILES; j++) {
            uint4 x = eight_of(input, ours[j], k, columns);
            u32 b[2][2] = {{x.x, x.y}, {x.z, x.w}};
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                u32 a[2][4] = {{w[2 * i].x, w[2 * i + 1].x, w[2 * i].y, w[2 * i + 1].y},
                               {w[2 * i].z, w[2 * i + 1].z, w[2 * i].w, w[2 * i + 1].w}};
                mma_bf16(sums[i][j], a[0], b[0]);
                mma_bf16(sums[i][j], a[1], b[1]);
            }
        }
        k += FEW_WARPS * FEW_COLUMNS;
    }
#pragma unroll
    for (u32 j = 0; j < TILES; j++) {
        // [FEW_WARPS][8 rows][FEW_OUTPUTS]
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
#pragma unroll
            for (u32 n = 0; n < 4; n++) {
                parts[(warp * 8 + 2 * t + n % 2) * FEW_OUTPUTS + 16 * i + g + n / 2 * 8] = sums[i][j][n];
            }
        }
        __syncthreads();
        u32 r = threadIdx.x / FEW_OUTPUTS, n = threadIdx.x % FEW_OUTPUTS;
        if (r < 8 && first + 8 * j + r < rows && output_first + n < outputs) {
            float sum = 0.0f;
#pragma unroll
            for (u32 from = 0; from < FEW_WARPS; from++) sum += parts[(from * 8 + r) * FEW_OUTPUTS + n];
            u64 at = (u64)row_at(first + 8 * j + r) * outputs + output_first + n;
            if (full) {
                ((float*)output)[at] = sum;
            } else {
                ((bf16*)output)[at] = narrow(sum);
            }
        }
        __syncthreads();
    }
}

// output = input weight^T with f32 sums, for rows of single tokens or of outputs, each weight read once for up to so many
// rows as the name says. Grid (ceil(outputs / 32), ceil(rows / that)), block 512.
//   batch   the batch
//   kind    TOKENS or OUTPUTS: what a row stands for
//   input   [.., columns] bf16
//   weight  [outputs, columns] bf16; both aligned to 16 bytes
//   output  [.., outputs], f32 if `full`, else bf16
#define LINEAR_FEW(name, tiles)                                                                                       \
    extern "C" __global__ void __launch_bounds__(FEW_WARPS * 32, 1) name(                                             \
        const u32* batch, u32 kind, const bf16* input, const bf16* weight, void* output, u32 full, u32 columns,       \
        u32 outputs) {                                                                                                \
        few<tiles>(batch, kind, input, weight, output, full, columns, outputs);                                       \
    }

LINEAR_FEW(linear_few_8, 1)
LINEAR_FEW(linear_few_16, 2)
LINEAR_FEW(linear_few_32, 4)
LINEAR_FEW(linear_few_64, 8)
ENTRY(linear_few_8)
ENTRY(linear_few_16)
ENTRY(linear_few_32)
ENTRY(linear_few_64)
