// The experts that a layer chose, for rows of single tokens. Counterpart of `trace_route` in src/backend/cpu/trace.rs.
#include "shared/kernel.h"
#include "shared/batch.h"
#include "shared/params_trace.h"

// One block of 32 threads per row; rows of longer segments are zero. Writes the part of `layer`.
extern "C" __global__ void __launch_bounds__(32) trace_route(const TraceRouteParams p) {
    grid_dependency_synchronize();
    u32 row = blockIdx.x;
    if (row >= p.batch[TOKENS]) return;
    bool single = segment_word(p.batch, owner(p.batch, row), LENGTH) == 1;
    float* output = p.output + ((u64)row * p.layers + p.layer) * 2 * p.top;
    for (u32 i = threadIdx.x; i < p.top; i += 32) {
        output[i] = single ? (float)p.experts[(u64)row * p.top + i] : 0.0f;
        output[p.top + i] = single ? p.weights[(u64)row * p.top + i] : 0.0f;
    }
}
ENTRY(trace_route)
