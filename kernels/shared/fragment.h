// Tiles of 16 rows by 16 columns of bf16 in shared memory, 512 bytes each, and how they are loaded into the fragments of mma.
//
// A matrix is a list of tiles, so that one ldmatrix loads a tile and one asynchronous copy per warp writes it.
#pragma once

// Elements of a tile.
#define TILE 256

// The offset of eight columns (`half` 0 or 1) of a row in a tile: swapped in every other four rows, so that the eight rows of
// a matrix of ldmatrix are in different banks.
static __device__ __forceinline__ u32 eight_at(u32 row, u32 half) { return (2 * row + (half ^ (row / 4 % 2))) * 8; }
// Element `column` of row `row` of a row of tiles.
static __device__ __forceinline__ u32 element_at(u32 row, u32 column) {
    return column / 16 * TILE + eight_at(row, column / 8 % 2) + column % 8;
}

// The rows of a tile that a lane passes to ldmatrix. `down`: matrices 0 and 1 are its two halves of columns, 2 and 3 those of
// rows 8 to 15: as b of a product with the tile's transpose. `across`: matrices 0 and 1 are its two halves of rows: as a of a
// product, or, transposed, as b of a product with the tile.
static __device__ __forceinline__ u32 lane_down(u32 lane) { return eight_at(lane % 8 + lane / 16 * 8, lane / 8 % 2); }
static __device__ __forceinline__ u32 lane_across(u32 lane) { return eight_at(lane % 16, lane / 16); }

// A number as a bf16 and its rounding error in bf16.
static __device__ __forceinline__ void split(float x, bf16& part, bf16& rest) {
    part = narrow(x);
    rest = narrow(x - widen(part));
}
static __device__ __forceinline__ void split_pair(float a, float b, u32& part, u32& rest) {
    part = narrow_pair(a, b);
    rest = narrow_pair(a - low(part), b - high(part));
}

// sum += a b for a tile b, in its two halves of eight columns.
static __device__ __forceinline__ void multiply_halves(float (&sum)[2][4], const u32 (&a)[4], const u32 (&b)[4]) {
    u32 first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
    mma_bf16(sum[0], a, first);
    mma_bf16(sum[1], a, second);
}
