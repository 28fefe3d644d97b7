// Products with weights that are not stored in bf16, read as they are stored; those in bf16 are cuBLASLt's. Twin of
// src/backend/cpu/linear.rs.
#include "shared/kernel.h"
#include "shared/batch.h"
#include "shared/weight.h"

// Rows a warp takes together, so that each weight is read once for all of them.
#define TOGETHER 8

// output = input weight^T with f32 sums; a warp an output, eight a block; blockIdx.y counts eights of rows.
//   batch   the batch
//   kind    TOKENS or OUTPUTS: what a row stands for
//   input   [.., columns] bf16
//   weight  [outputs, columns] of the format
//   output  [.., outputs], f32 if `full`, else bf16
extern "C" __global__ void __launch_bounds__(256) linear(
    const u32* batch, u32 kind, const bf16* input, const void* weight, u32 format, void* output, u32 full, u32 columns,
    u32 outputs) {
    u32 n = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    u32 first = blockIdx.y * TOGETHER, rows = batch[kind];
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
        u64 at = (u64)(first + r) * outputs + n;
        if (full) {
            ((float*)output)[at] = sum;
        } else {
            ((bf16*)output)[at] = narrow(sum);
        }
    }
}
ENTRY(linear)
