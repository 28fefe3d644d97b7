// Products of tiles on tensor cores: c[128, 128] += a[128, 32] b[128, 32]^T with 128 threads, each warp a quarter of 64 x 64.
// Rows are passed as a function, so that they may be gathered; missing rows, and columns past the last, are zero.
#pragma once
#include "shared/weight.h"

#define TILE_ROWS 128
#define TILE_COLUMNS 128
#define TILE_DEPTH 32
// Row stride: 8 elements more than a power of two, so that ldmatrix has no bank conflicts.
#define TILE_STRIDE 40
#define TILE_ELEMENTS (TILE_ROWS * TILE_STRIDE)
// Steps in shared memory: one that is multiplied, others in flight.
#define TILE_STAGES 4
// Rows of each operand that a thread loads, a quarter of a row's depth each.
#define TILE_OWN (TILE_ROWS * TILE_DEPTH / 8 / 128)

// Sums of a warp's quarter: four groups of sixteen rows by eight groups of eight columns.
typedef float TileSums[4][8][4];

static __device__ __forceinline__ void clear(TileSums& sums) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 8; j++) {
#pragma unroll
            for (int n = 0; n < 4; n++) sums[i][j][n] = 0.0f;
        }
    }
}

// The row of the tile for a thread's row number `i`.
static __device__ __forceinline__ u32 tile_row(u32 i) { return threadIdx.x / (TILE_DEPTH / 8) + i * (TILE_ROWS / TILE_OWN); }

// Copies a thread's rows from column `k` on into a tile; null rows are zero. Copies of 16 bytes if rows of `width` elements
// are aligned to them, otherwise element by element.
static __device__ __forceinline__ void tile_load(bf16* tile, const bf16* const (&rows)[TILE_OWN], u32 k, u32 width) {
    u32 c = threadIdx.x % (TILE_DEPTH / 8) * 8;
#pragma unroll
    for (u32 i = 0; i < TILE_OWN; i++) {
        const bf16* from = rows[i];
        bf16* to = tile + tile_row(i) * TILE_STRIDE + c;
        if (width % 8 == 0) {
            bool there = from != nullptr && k + c < width;
            copy_async(to, there ? from + k + c : nullptr, there);
        } else {
#pragma unroll 1
            for (u32 j = 0; j < 8; j++) to[j] = from != nullptr && k + c + j < width ? from[k + c + j] : bf16{0};
        }
    }
}

// 64 rows of a tile from a weight of any format: `rows` of them exist, from element `first` on.
struct StoredRows {
    const void* weight;
    u32 format;
    u64 first;
    u32 rows;
};

// The same for rows of two weights, or twice of one: widened, and rounded to bf16 when they are written to the tile, so that
// no copy of the weight is needed. Rows have the width of the product.
static __device__ __forceinline__ void tile_load(bf16* tile, const StoredRows (&halves)[2], u32 k, u32 width) {
    u32 c = threadIdx.x % (TILE_DEPTH / 8) * 8;
    // One loop for all rows: decoding blocks is long code.
#pragma unroll 1
    for (u32 i = 0; i < TILE_OWN; i++) {
        bool second = i >= TILE_OWN / 2;
        const void* weight = second ? halves[1].weight : halves[0].weight;
        u32 format = second ? halves[1].format : halves[0].format, rows = second ? halves[1].rows : halves[0].rows;
        u64 first = second ? halves[1].first : halves[0].first;
        u32 r = tile_row(i), n = r % (TILE_ROWS / 2);
        float x[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
        if (n < rows && k + c < width) weights_at(weight, format, first + (u64)n * width + k + c, width, k + c, x);
        *(uint4*)(tile + r * TILE_STRIDE + c) =
            make_uint4(narrow_pair(x[0], x[1]), narrow_pair(x[2], x[3]), narrow_pair(x[4], x[5]), narrow_pair(x[6], x[7]));
    }
}

// The first column in the tile of a warp's group `j` of sixteen: its columns are 64 consecutive ones, or, for a product with
// two matrices of 64 rows each, 32 of the first and the same 32 of the second.
template <bool TWO>
static __device__ __forceinline__ u32 tile_column(u32 j) {
    u32 half = threadIdx.x / 32 % 2;
    return TWO ? j / 2 * 64 + half * 32 + j % 2 * 16 : half * 64 + j * 16;
}
// The first of a warp's rows.
static __device__ __forceinline__ u32 tile_first_row() { return threadIdx.x / 64 * 64; }

// c += a b^T over tiles in shared memory; the first `rows` of a's rows exist.
template <bool TWO>
static __device__ __forceinline__ void tile_multiply(TileSums& c, const bf16* a, const bf16* b, u32 rows) {
    u32 lane = threadIdx.x % 32, first = tile_first_row();
    a += (first + lane % 16) * TILE_STRIDE + lane / 16 * 8;
    b += (lane % 8 + lane / 16 * 8) * TILE_STRIDE + lane / 8 % 2 * 8;
    if (first >= rows) return;
#pragma unroll
    for (int k = 0; k < TILE_DEPTH; k += 16) {
        u32 right[4][4];
#pragma unroll
        for (u32 j = 0; j < 4; j++) ldmatrix(right[j], b + tile_column<TWO>(j) * TILE_STRIDE + k);
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            if (first + i * 16 >= rows) continue;
            u32 left[4];
            ldmatrix(left, a + i * 16 * TILE_STRIDE + k);
#pragma unroll
            for (u32 j = 0; j < 8; j++) {
                u32 pair[2] = {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]};
                mma_bf16(c[i][j], left, pair);
            }
        }
    }
}

// c = a b^T over all of `width`: stages in dynamic shared memory, each TILE_ELEMENTS of a and then of b. The rows of b are
// bf16, or rows of a weight.
template <bool TWO, class B>
static __device__ __forceinline__ void tile_product(
    TileSums& c, bf16* shared, const bf16* const (&a)[TILE_OWN], const B& b, u32 width, u32 rows) {
    u32 steps = (width + TILE_DEPTH - 1) / TILE_DEPTH;
    auto load = [&](u32 step) {
        bf16* stage = shared + step % TILE_STAGES * 2 * TILE_ELEMENTS;
        if (step < steps) {
            tile_load(stage, a, step * TILE_DEPTH, width);
            tile_load(stage + TILE_ELEMENTS, b, step * TILE_DEPTH, width);
        }
        copy_async_commit();
    };
    clear(c);
    for (u32 step = 0; step + 1 < TILE_STAGES; step++) load(step);
    for (u32 step = 0; step < steps; step++) {
        copy_async_wait<TILE_STAGES - 2>();
        // The stage that is filled next was read before this barrier.
        __syncthreads();
        load(step + TILE_STAGES - 1);
        const bf16* stage = shared + step % TILE_STAGES * 2 * TILE_ELEMENTS;
        tile_multiply<TWO>(c, stage, stage + TILE_ELEMENTS, rows);
    }
}

// Calls `f(row, i, n)` for each of this thread's rows of the tile: its sums are c[i][..][n], c[i][..][n + 1], of the columns
// 2 (lane % 4) and the next of each eight.
template <class F>
static __device__ __forceinline__ void tile_rows(F f) {
    u32 lane = threadIdx.x % 32;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
#pragma unroll
        for (u32 n = 0; n < 4; n += 2) f(tile_first_row() + i * 16 + lane / 4 + n / 2 * 8, i, n);
    }
}
