// target += source. Counterpart of the sum in src/backend/cpu/step.rs.
#include "shared/kernel.h"
#include "shared/batch.h"
#include "shared/params_rows.h"

// Over rows of bf16, 256 elements per block.
extern "C" __global__ void __launch_bounds__(256) add(const AddParams p) {
    grid_dependency_synchronize();
    const bf16* source = (const bf16*)p.source;
    bf16* target = (bf16*)p.target;
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i >= (u64)p.batch[p.rows] * p.width) return;
    target[i] = narrow(widen(target[i]) + widen(source[i]));
}
ENTRY(add)

// The same over f32.
extern "C" __global__ void __launch_bounds__(256) add_f32(const AddParams p) {
    grid_dependency_synchronize();
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i < (u64)p.batch[p.rows] * p.width) ((float*)p.target)[i] += ((const float*)p.source)[i];
}
ENTRY(add_f32)
