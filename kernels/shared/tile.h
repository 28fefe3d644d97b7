// Products of tiles on tensor cores: c[64, 64] += a[64, 32] b[64, 32]^T with 128 threads, each warp a quarter of 32 x 32.
// Rows come through a function, so that they may be gathered; rows that are not there, and columns past the last, are
// zero.
#pragma once

#define TILE_ROWS 64
#define TILE_COLUMNS 64
#define TILE_DEPTH 32
// Rows are 8 elements apart from a power of two, so that ldmatrix meets no bank twice.
#define TILE_STRIDE 40
#define TILE_ELEMENTS (TILE_ROWS * TILE_STRIDE)

static __device__ __forceinline__ void clear(float (&sums)[2][4][4]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
#pragma unroll
            for (int n = 0; n < 4; n++) sums[i][j][n] = 0.0f;
        }
    }
}

// 64 rows of 32 elements from `k` on into shared memory; `row(r)` points to a row of `width` elements or is null. Copies
// of 16 bytes where rows are aligned to them, else element by element.
template <class Row>
static __device__ __forceinline__ void tile_load(bf16* tile, u32 k, u32 width, Row row) {
    for (u32 i = threadIdx.x; i < TILE_ROWS * TILE_DEPTH / 8; i += 128) {
        u32 r = i / (TILE_DEPTH / 8), c = i % (TILE_DEPTH / 8) * 8;
        const bf16* from = row(r);
        bf16* to = tile + r * TILE_STRIDE + c;
        if (width % 8 == 0) {
            bool there = from != nullptr && k + c < width;
            copy_async(to, there ? from + k + c : nullptr, there);
        } else {
            for (u32 j = 0; j < 8; j++) to[j] = from != nullptr && k + c + j < width ? from[k + c + j] : bf16{0};
        }
    }
}

// c += a b^T over tiles in shared memory.
static __device__ __forceinline__ void tile_multiply(float (&c)[2][4][4], const bf16* a, const bf16* b) {
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    a += (warp / 2 * 32 + lane % 16) * TILE_STRIDE + lane / 16 * 8;
    b += (warp % 2 * 32 + lane % 8 + lane / 16 * 8) * TILE_STRIDE + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < TILE_DEPTH; k += 16) {
        u32 left[2][4], right[2][4];
#pragma unroll
        for (int i = 0; i < 2; i++) ldmatrix(left[i], a + i * 16 * TILE_STRIDE + k);
#pragma unroll
        for (int j = 0; j < 2; j++) ldmatrix(right[j], b + j * 16 * TILE_STRIDE + k);
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                u32 pair[2] = {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]};
                mma_bf16(c[i][j], left[i], pair);
            }
        }
    }
}

// Calls `f(row, column, i, j, n)` for each element c[i][j][n] of this thread.
template <class F>
static __device__ __forceinline__ void tile_each(F f) {
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
#pragma unroll
            for (u32 n = 0; n < 4; n++) {
                f(warp / 2 * 32 + i * 16 + lane / 4 + n / 2 * 8, warp % 2 * 32 + j * 8 + lane % 4 * 2 + n % 2, i, j, n);
            }
        }
    }
}
