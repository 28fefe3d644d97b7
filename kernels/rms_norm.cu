// Root mean square normalisation of rows. Counterpart of src/backend/cpu/rms_norm.rs.
#include "shared/kernel.h"
#include "shared/batch.h"
#include "shared/weight.h"
#include "shared/norm.h"

// output[r] = input / sqrt(mean(input^2) + eps) * weight; one block of 256 threads per row.
//   batch   the batch
//   kind    TOKENS or OUTPUTS: the kind of the output's rows
//   gather  1: the input has a row per token and the output one per output row; 0: row r is read from row r
//   input   [.., width] bf16
//   weight  [width] of the format
//   output  [.., width] bf16
extern "C" __global__ void __launch_bounds__(256) rms_norm(
    const u32* batch, u32 kind, u32 gather, const bf16* input, const void* weight, u32 format, bf16* output, u32 width,
    float eps) {
    grid_dependency_synchronize();
    SHARED(float, scratch, 32);
    u32 r = blockIdx.x;
    if (r >= batch[kind]) return;
    input += (u64)(gather ? batch[batch[AT_OUTPUTS] + OUTPUT_WORDS * r + OUTPUT_ROW] : r) * width;
    normalise(input, weight, format, output + (u64)r * width, width, eps, scratch);
}
ENTRY(rms_norm)
