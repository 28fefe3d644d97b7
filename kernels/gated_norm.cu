// The output gate of a KDA layer: a norm over each head, times a sigmoid gate. Counterpart of src/backend/cpu/gated_norm.rs.
#include "shared/kernel.h"
#include "shared/batch.h"
#include "shared/weight.h"

// output = input / sqrt(mean over a head(input^2) + eps) * weight * sigmoid(gate); one warp per head, eight per block.
//   batch   the batch
//   input   [T, heads * width] bf16
//   gate    [T, heads * width] bf16, before the sigmoid
//   weight  [width] of the format
//   output  [T, heads * width] bf16
extern "C" __global__ void __launch_bounds__(256) gated_norm(
    const u32* batch, const bf16* input, const bf16* gate, const void* weight, u32 format, bf16* output, u32 heads,
    u32 width, float eps) {
    grid_dependency_synchronize();
    u64 head = (u64)blockIdx.x * 8 + threadIdx.x / 32;
    u32 lane = threadIdx.x % 32;
    if (head >= (u64)batch[TOKENS] * heads) return;
    u64 at = head * width;
    float squares = 0.0f;
    for (u32 i = lane; i < width; i += 32) {
        float x = widen(input[at + i]);
        squares += x * x;
    }
    float scale = 1.0f / sqrtf(warp_sum(squares) / (float)width + eps);
    for (u32 i = lane; i < width; i += 32) {
        float x = widen(input[at + i]) * scale * weight_at(weight, format, i);
        output[at + i] = narrow(x * sigmoid(widen(gate[at + i])));
    }
}
ENTRY(gated_norm)
