// Root mean square normalisation of rows. Counterpart of src/backend/cpu/rms_norm.rs.
#include "shared/kernel.h"
#include "shared/batch.h"
#include "shared/weight.h"
#include "shared/norm.h"
#include "shared/params_rows.h"

// output[r] = input / sqrt(mean(input^2) + eps) * weight; one block of 256 threads per row.
extern "C" __global__ void __launch_bounds__(256) rms_norm(const RmsNormParams p) {
    grid_dependency_synchronize();
    SHARED(float, scratch, 32);
    u32 r = blockIdx.x;
    if (r >= p.batch[p.rows]) return;
    const bf16* input = p.input + (u64)(p.gather ? p.batch[p.batch[AT_OUTPUTS] + OUTPUT_WORDS * r + OUTPUT_ROW] : r) * p.width;
    normalise(input, p.weight, p.format, p.output + (u64)r * p.width, p.width, p.eps, scratch);
}
ENTRY(rms_norm)
