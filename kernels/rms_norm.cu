// Root mean square normalisation of rows. Twin of src/backend/cpu/rms_norm.rs.
#include "shared/kernel.h"
#include "shared/batch.h"
#include "shared/weight.h"

// output[r] = input[rows[r]] / sqrt(mean(input^2) + eps) * weight; one block of up to 256 threads a row.
//   input   [.., width] bf16
//   batch   the batch, if only its output rows are wanted, in their order; null: all rows
//   weight  [width] of the format
//   output  [count, width] bf16
extern "C" __global__ void __launch_bounds__(256) rms_norm(
    const bf16* input, const u32* batch, const void* weight, u32 format, bf16* output, u32 width, float eps) {
    SHARED(float, scratch, 32);
    u32 r = blockIdx.x;
    input += (u64)(batch ? batch[batch[AT_OUTPUTS] + 2 * r] : r) * width;
    output += (u64)r * width;
    float squares = 0.0f;
    for (u32 i = threadIdx.x; i < width; i += blockDim.x) {
        float x = widen(input[i]);
        squares += x * x;
    }
    float scale = 1.0f / sqrtf(block_sum(squares, scratch) / (float)width + eps);
    for (u32 i = threadIdx.x; i < width; i += blockDim.x) {
        output[i] = narrow(widen(input[i]) * scale * weight_at(weight, format, i));
    }
}
ENTRY(rms_norm)
