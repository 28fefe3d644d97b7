// The output of `kda_prepare` for `kda_scan`, per chunk and head: an image of the shared memory that the scan needs.
//
//   -W        [16, K]   W = (I + A_kk)^-1 beta K exp(G)
//   Q exp(G)  [16, K]
//   Kr        [16, K], and its rounding error [16, K]
//   A_qk      [16, 16]
//   exp(G_16) [K] f32
// K padded to 32, 64 or 128: the common part. Then, for each sixteen columns of V, 512 bytes of f16 and 16 that begin with a
// scale, a power of two in f32:
//   (I + A_kk)^-1 beta V = scale * tile   [16, 16]
//
// Matrices are tiles of 16 rows (tokens) by 16 columns, 512 bytes each; all but the last are bf16.
#pragma once

#include "fragment.h"
#include "kda.h"

// Tokens per chunk.
#define CHUNK 16
// Elements from one tile of values to the next, and of the tile itself.
#define VALUE_STRIDE (TILE + 8)

static __device__ __forceinline__ u32 value_tiles(u32 v) { return (v + 15) / 16; }
// Bytes of an image before its values, and of the whole image.
static __device__ __forceinline__ u32 common_bytes(u32 padded) { return (4 * padded / 16 + 1) * TILE * 2 + padded * 4; }
static __device__ __forceinline__ u32 image_bytes(u32 padded, u32 v) {
    return common_bytes(padded) + value_tiles(v) * VALUE_STRIDE * 2;
}

// The offset in tile `tile` of eight columns (`half` 0 or 1) of a row. The eight rows of a matrix of ldmatrix are in
// different banks, and so are two adjacent tiles' rows t and t + 8, which a warp of `kda_prepare` writes together.
static __device__ __forceinline__ u32 unit_at(u32 tile, u32 row, u32 half) {
    return (((2 * row + (half ^ (row / 4 % 2))) ^ (row / 8 * 4)) ^ (tile % 2 * 2)) * 8;
}
// The rows of tile 0 that a lane passes to ldmatrix, as `lane_down` and `lane_across`; those of another tile.
static __device__ __forceinline__ u32 unit_down(u32 lane) { return unit_at(0, lane % 8 + lane / 16 * 8, lane / 8 % 2); }
static __device__ __forceinline__ u32 unit_across(u32 lane) { return unit_at(0, lane % 16, lane / 16); }
static __device__ __forceinline__ u32 in_tile(u32 tile, u32 unit) { return tile * TILE + (unit ^ (tile % 2 * 16)); }

// Writes the pair of elements `d` and `d + 1`, `d` even, of row `row` of a matrix.
static __device__ __forceinline__ void put_pair(bf16* matrix, u32 row, u32 d, u32 pair) {
    u32 tile = d / 16;
    *(u32*)(matrix + tile * TILE + unit_at(tile, row, d / 8 % 2) + d % 8) = pair;
}
// The offset of that pair for row 8 `half`; row 8 `half` + i is at `at ^ row_bits(i)`, so that one address is used for eight
// rows.
static __device__ __forceinline__ u32 pair_at(u32 half, u32 d) {
    return d / 16 * TILE + unit_at(d / 16, half * 8, d / 8 % 2) + d % 8;
}
static __device__ __forceinline__ constexpr u32 row_bits(u32 i) { return (2 * i + i / 4) * 8; }
