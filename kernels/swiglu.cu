// The gated activation of an MLP (Shazeer, arXiv 2002.05202). Counterpart of src/backend/cpu/swiglu.rs.
#include "shared/kernel.h"
#include "shared/batch.h"
#include "shared/params_rows.h"

// output = silu(gate) * up, where a row of the input is gate, then up; 256 elements per block.
extern "C" __global__ void __launch_bounds__(256) swiglu(const SwigluParams p) {
    grid_dependency_synchronize();
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i >= (u64)p.batch[p.rows] * p.width) return;
    u64 row = i / p.width, column = i % p.width;
    float gate = widen(p.input[2 * row * p.width + column]), up = widen(p.input[(2 * row + 1) * p.width + column]);
    p.output[i] = narrow(silu(gate) * up);
}
ENTRY(swiglu)
