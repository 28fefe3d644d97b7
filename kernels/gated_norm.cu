// The output gate of a KDA layer: a norm over each head, times a sigmoid gate. Counterpart of src/backend/cpu/gated_norm.rs.
#include "shared/kernel.h"
#include "shared/batch.h"
#include "shared/weight.h"
#include "shared/params_kda.h"

// output = input / sqrt(mean over a head(input^2) + eps) * weight * sigmoid(gate); one warp per head, eight per block.
extern "C" __global__ void __launch_bounds__(256) gated_norm(const GatedNormParams p) {
    grid_dependency_synchronize();
    u64 head = (u64)blockIdx.x * 8 + threadIdx.x / 32;
    u32 lane = threadIdx.x % 32;
    if (head >= (u64)p.batch[TOKENS] * p.heads) return;
    u64 at = head * p.width;
    float squares = 0.0f;
    for (u32 i = lane; i < p.width; i += 32) {
        float x = widen(p.input[at + i]);
        squares += x * x;
    }
    float scale = 1.0f / sqrtf(warp_sum(squares) / (float)p.width + p.eps);
    for (u32 i = lane; i < p.width; i += 32) {
        float x = widen(p.input[at + i]) * scale * weight_at(p.weight, p.format, i);
        p.output[at + i] = narrow(x * sigmoid(widen(p.gate[at + i])));
    }
}
ENTRY(gated_norm)
