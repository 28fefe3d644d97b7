// The gated activation of an MLP (Shazeer, arXiv 2002.05202). Counterpart of src/backend/cpu/swiglu.rs.
#include "shared/kernel.h"
#include "shared/batch.h"

// output = silu(gate) * up, where a row of the input is gate, then up; 256 elements per block.
//   batch   the batch
//   kind    TOKENS or OUTPUTS: the kind of the rows
//   input   [.., 2 width] bf16
//   output  [.., width] bf16
extern "C" __global__ void __launch_bounds__(256) swiglu(
    const u32* batch, u32 kind, const bf16* input, bf16* output, u32 width) {
    grid_dependency_synchronize();
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i >= (u64)batch[kind] * width) return;
    u64 row = i / width, column = i % width;
    float gate = widen(input[2 * row * width + column]), up = widen(input[(2 * row + 1) * width + column]);
    output[i] = narrow(silu(gate) * up);
}
ENTRY(swiglu)
