// A residual sum and the root mean square norm of it. Counterpart of the sum in src/backend/cpu/step.rs with
// src/backend/cpu/rms_norm.rs, and with the bits of add.cu and rms_norm.cu one after the other.
#include "shared/kernel.h"
#include "shared/batch.h"
#include "shared/weight.h"
#include "shared/norm.h"
#include "shared/params_rows.h"

// target += source; output = target / sqrt(mean(target^2) + eps) * weight; one block of 256 threads per row.
extern "C" __global__ void __launch_bounds__(256) add_norm(const AddNormParams p) {
    grid_dependency_synchronize();
    SHARED(float, scratch, 32);
    if (blockIdx.x >= p.batch[p.rows]) return;
    u64 at = (u64)blockIdx.x * p.width;
    add_normalise(p.source + at, p.target + at, p.weight, p.format, p.output + at, p.width, p.eps, scratch);
}
ENTRY(add_norm)
