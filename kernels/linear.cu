// Products with few rows: those of single tokens and of outputs with weights in bf16 or in blocks, and all rows with weights
// of another dtype. Rows of longer segments use cuBLASLt if weights are bf16, and tiles if they are blocks. Blocks are
// widened when they are loaded and rounded to bf16, the operands of tensor cores. Counterpart of src/backend/cpu/linear.rs.
#include "shared/kernel.h"
#include "shared/batch.h"
#include "shared/eights.h"
#include "shared/tile.h"
#include "shared/weight.h"
#include "shared/params_rows.h"

// Rows that a warp computes together, so that each weight is read once for all of them.
#define TOGETHER 8

// Some columns of output = input weight^T with f32 sums; one warp per output, eight per block; blockIdx.y counts groups of
// eight rows.
extern "C" __global__ void __launch_bounds__(256) linear(const LinearParams p) {
    grid_dependency_synchronize();
    u32 n = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    u32 first = blockIdx.y * TOGETHER, rows = p.batch[p.rows];
    if (n >= p.outputs || first >= rows) return;
    float sums[TOGETHER];
#pragma unroll
    for (u32 r = 0; r < TOGETHER; r++) sums[r] = 0.0f;
    for (u32 i = lane; i < p.columns; i += 32) {
        float w = weight_at(p.weight, p.format, (u64)n * p.columns + i);
#pragma unroll
        for (u32 r = 0; r < TOGETHER; r++) {
            if (first + r < rows) sums[r] += w * widen(p.input[(u64)(first + r) * p.columns + i]);
        }
    }
#pragma unroll
    for (u32 r = 0; r < TOGETHER; r++) {
        float sum = warp_sum(sums[r]);
        if (lane != 0 || first + r >= rows) continue;
        u64 at = (u64)(first + r) * p.width + p.first + n;
        if (p.full) {
            ((float*)p.output)[at] = sum;
        } else {
            ((bf16*)p.output)[at] = narrow(sum);
        }
    }
}
ENTRY(linear)

// Outputs per block of `linear_few`: two tiles of 16, which share the loads of the input.
#define FEW_OUTPUTS 32
// Its warps alternate along the columns; their sums are added in the warps' order.
#define FEW_WARPS 16
// Columns per iteration: eight per lane, in one access.
#define FEW_COLUMNS 32

// Eight elements of row `r` of a matrix from column `k` on; zeros without a row (NONE) or a column.
template <bool WHOLE>
static __device__ __forceinline__ uint4 eight_of(const bf16* matrix, u32 r, u32 k, u32 columns) {
    if (r == NONE || k >= columns) return make_uint4(0, 0, 0, 0);
    return eight_of<WHOLE>(matrix + (u64)r * columns + k, k, columns);
}

// The destination in rows of output: columns from `first` on of rows of `width`, f32 if `full`, else bf16.
struct Columns {
    void* output;
    u32 full, first, width;

    __device__ __forceinline__ void put(u32 row, u32 n, float sum) const {
        u64 at = (u64)row * width + first + n;
        if (full) {
            ((float*)output)[at] = sum;
        } else {
            ((bf16*)output)[at] = narrow(sum);
        }
    }
};

// A product of a launch of several.
struct Product {
    const bf16 *input, *weight;
    void* output;
    u32 columns, outputs;
};

// The product that a block belongs to; `block` counts from the first block of all products, then of this one.
static __device__ __forceinline__ Product product_of(const LinearFewParams& p, u32& block) {
    u32 n = 0;
#pragma unroll
    for (u32 next = 0; next < 3; next++) {
        u32 blocks = (p.outputs[next] + FEW_OUTPUTS - 1) / FEW_OUTPUTS;
        if (n < next || block < blocks) continue;
        block -= blocks;
        n++;
    }
    return {p.input[n], p.weight[n], p.output[n], p.columns[n], p.outputs[n]};
}

// `load(n, k)` returns eight elements of the weight's row `n`, or of NONE, from column `k` on, in bf16. The order of columns
// in a sum of products is free: a lane reads eight consecutive columns, and uses them as the columns of a fragment, in the
// weight and in the input alike. A row's sum does not depend on other rows. WHOLE: rows of the input have a multiple of eight
// columns; checked outside of the loops. `parts` is [FEW_WARPS][8][FEW_OUTPUTS] of shared memory.
template <int TILES, bool WHOLE, class W>
static __device__ __forceinline__ void few(
    const u32* batch, u32 kind, const bf16* input, W load, const Columns& to, u32 columns, u32 outputs, u32 block,
    float* parts) {
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    u32 several = kind == TOKENS ? batch[SEVERAL_ROWS] : 0, rows = batch[kind] - several;
    const u32* order = kind == TOKENS ? batch + batch[AT_ROWS] + several : nullptr;
    u32 first = blockIdx.y * (8 * TILES), output_first = block * FEW_OUTPUTS;
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
        return load(n < outputs ? n : NONE, k);
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
    // The weight of the next iteration is loaded while this one is multiplied, if enough registers are left.
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
            uint4 x = eight_of<WHOLE>(input, ours[j], k, columns);
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
            to.put(row_at(first + 8 * j + r), output_first + n, sum);
        }
        __syncthreads();
    }
}

// Up to four products output = input weight^T with f32 sums, for rows of single tokens or of outputs. Each weight is read once
// for the number of rows in the kernel's name. Blocks of the first product come first. Grid (sum of ceil(outputs / 32),
// ceil(rows / that number)), block 512.
#define LINEAR_FEW(name, tiles)                                                                                       \
    extern "C" __global__ void __launch_bounds__(FEW_WARPS * 32, 1) name(const LinearFewParams p) {                   \
        grid_dependency_synchronize();                                                                                \
        u32 block = blockIdx.x;                                                                                       \
        Product own = product_of(p, block);                                                                           \
        Columns to{own.output, p.full, 0, own.outputs};                                                               \
        SHARED(float, parts, FEW_WARPS * FEW_OUTPUTS * 8);                                                            \
        if (own.columns % 8 == 0) {                                                                                   \
            auto load = [&](u32 n, u32 k) { return eight_of<true>(own.weight, n, k, own.columns); };                  \
            few<tiles, true>(p.batch, p.rows, own.input, load, to, own.columns, own.outputs, block, parts);           \
        } else {                                                                                                      \
            auto load = [&](u32 n, u32 k) { return eight_of<false>(own.weight, n, k, own.columns); };                 \
            few<tiles, false>(p.batch, p.rows, own.input, load, to, own.columns, own.outputs, block, parts);          \
        }                                                                                                             \
    }

LINEAR_FEW(linear_few_8, 1)
LINEAR_FEW(linear_few_16, 2)
LINEAR_FEW(linear_few_32, 4)
LINEAR_FEW(linear_few_64, 8)
ENTRY(linear_few_8)
ENTRY(linear_few_16)
ENTRY(linear_few_32)
ENTRY(linear_few_64)

// The same for some rows of a weight in blocks, eight rows of the input at a time: columns from `first` on of rows of
// `output`, which have `width` columns. Grid (ceil(outputs / 32), ceil(rows / 8)), block 512.
extern "C" __global__ void __launch_bounds__(FEW_WARPS * 32, 1) linear_few_blocks(const __grid_constant__ LinearParams p) {
    grid_dependency_synchronize();
    auto load = [&](u32 n, u32 k) {
        if (n == NONE || k >= p.columns) return make_uint4(0, 0, 0, 0);
        Codes x = eight_of_blocks(p.weight, p.format, (u64)n * p.columns + k);
        return make_uint4(narrow_pair(x[0], x[1]), narrow_pair(x[2], x[3]), narrow_pair(x[4], x[5]), narrow_pair(x[6], x[7]));
    };
    SHARED(float, parts, FEW_WARPS * FEW_OUTPUTS * 8);
    Columns to{p.output, p.full, p.first, p.width};
    few<1, true>(p.batch, p.rows, p.input, load, to, p.columns, p.outputs, blockIdx.x, parts);
}
ENTRY(linear_few_blocks)

// output = input weight^T with f32 sums, for rows of longer segments (y) and TILE_COLUMNS rows of a weight in blocks (x), on
// tensor cores; 128 threads. Rows are those of tokens. Dynamic shared memory: TILE_STAGES of two tiles.
extern "C" __global__ void __launch_bounds__(128, 2) linear_many_blocks(const LinearParams p) {
    grid_dependency_synchronize();
    u32 several = p.batch[SEVERAL_ROWS], first = blockIdx.y * TILE_ROWS, column = blockIdx.x * TILE_COLUMNS;
    if (first >= several) return;
    u32 rows = min(several - first, (u32)TILE_ROWS);
    const u32* order = p.batch + p.batch[AT_ROWS] + first;
    const bf16* a[TILE_OWN];
#pragma unroll
    for (u32 i = 0; i < TILE_OWN; i++) {
        u32 r = tile_row(i);
        a[i] = r < rows ? p.input + (u64)order[r] * p.columns : nullptr;
    }
    StoredRows b[2];
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        u32 n = column + half * (TILE_ROWS / 2);
        b[half] = {p.weight, p.format, (u64)n * p.columns, n < p.outputs ? min(p.outputs - n, TILE_ROWS / 2u) : 0};
    }
    TileSums sums;
    tile_product<false>(sums, (bf16*)dynamic_shared(), a, b, p.columns, rows);
    Columns to{p.output, p.full, p.first, p.width};
    column += threadIdx.x / 32 % 2 * 64 + threadIdx.x % 4 * 2;
    tile_rows([&](u32 r, u32 i, u32 n) {
        if (r >= rows) return;
#pragma unroll
        for (u32 j = 0; j < 8; j++) {
            u32 c = column + j * 8;
            if (c < p.outputs) to.put(order[r], c, sums[i][j][n]);
            if (c + 1 < p.outputs) to.put(order[r], c + 1, sums[i][j][n + 1]);
        }
    });
}
ENTRY(linear_many_blocks)
