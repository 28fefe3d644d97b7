// target += source. Counterpart of the sum in src/backend/cpu/step.rs.
#include "shared/kernel.h"
#include "shared/batch.h"

// Over rows of bf16, 256 elements per block.
//   batch   the batch
//   kind    TOKENS or OUTPUTS: the kind of the rows
//   source  [.., width] bf16
//   target  [.., width] bf16
extern "C" __global__ void __launch_bounds__(256) add(
    const u32* batch, u32 kind, const bf16* source, bf16* target, u32 width) {
    grid_dependency_synchronize();
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i >= (u64)batch[kind] * width) return;
    target[i] = narrow(widen(target[i]) + widen(source[i]));
}
ENTRY(add)

// The same over f32.
extern "C" __global__ void __launch_bounds__(256) add_f32(
    const u32* batch, u32 kind, const float* source, float* target, u32 width) {
    grid_dependency_synchronize();
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i < (u64)batch[kind] * width) target[i] += source[i];
}
ENTRY(add_f32)
