// The experts that a layer chose, for rows of single tokens. Counterpart of `trace_route` in src/backend/cpu/trace.rs.
#include "shared/kernel.h"
#include "shared/batch.h"

// One block of 32 threads per row; rows of longer segments are zero. Writes the part of `layer`.
//   batch    the batch
//   experts  [T, top] u32
//   weights  [T, top] f32
//   output   [T, layers, 2, top] f32: experts, then weights
extern "C" __global__ void __launch_bounds__(32) trace_route(
    const u32* batch, const u32* experts, const float* weights, float* output, u32 top, u32 layer, u32 layers) {
    grid_dependency_synchronize();
    u32 row = blockIdx.x;
    if (row >= batch[TOKENS]) return;
    bool single = segment_word(batch, owner(batch, row), LENGTH) == 1;
    output += ((u64)row * layers + layer) * 2 * top;
    for (u32 i = threadIdx.x; i < top; i += 32) {
        output[i] = single ? (float)experts[(u64)row * top + i] : 0.0f;
        output[top + i] = single ? weights[(u64)row * top + i] : 0.0f;
    }
}
ENTRY(trace_route)
