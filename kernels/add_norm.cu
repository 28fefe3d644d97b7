// A residual sum and the root mean square norm of it. Counterpart of the sum in src/backend/cpu/step.rs with
// src/backend/cpu/rms_norm.rs, and with the bits of add.cu and rms_norm.cu one after the other.
#include "shared/kernel.h"
#include "shared/batch.h"
#include "shared/weight.h"
#include "shared/norm.h"

// target += source; output = target / sqrt(mean(target^2) + eps) * weight; one block of 256 threads per row.
//   batch   the batch
//   kind    TOKENS or OUTPUTS: the kind of the rows
//   source  [.., width] bf16
//   target  [.., width] bf16
//   weight  [width] of the format
//   output  [.., width] bf16
extern "C" __global__ void __launch_bounds__(256) add_norm(
    const u32* batch, u32 kind, const bf16* source, bf16* target, const void* weight, u32 format, bf16* output, u32 width,
    float eps) {
    grid_dependency_synchronize();
    SHARED(float, scratch, 32);
    if (blockIdx.x >= batch[kind]) return;
    u64 at = (u64)blockIdx.x * width;
    add_normalise(source + at, target + at, weight, format, output + at, width, eps, scratch);
}
ENTRY(add_norm)
