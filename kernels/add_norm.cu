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
    SHARED(float, scratch, 32);
    u32 r = blockIdx.x;
    if (r >= batch[kind]) return;
    source += (u64)r * width;
    target += (u64)r * width;
    // A thread normalises the elements that it summed.
    for (u32 i = threadIdx.x; i < width; i += 256) target[i] = narrow(widen(target[i]) + widen(source[i]));
    normalise(target, weight, format, output + (u64)r * width, width, eps, scratch);
}
ENTRY(add_norm)
