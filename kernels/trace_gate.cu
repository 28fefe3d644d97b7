// The mean output gate of each head, for rows of single tokens. Counterpart of `trace_gate` in src/backend/cpu/trace.rs.
#include "shared/kernel.h"
#include "shared/batch.h"

// output = mean over a head of sigmoid(gate), 0 for rows of longer segments; one warp per head, eight per block.
// Writes the part of `layer`.
//   batch   the batch
//   gate    [T, heads * width] bf16
//   output  [T, layers, heads] f32
extern "C" __global__ void __launch_bounds__(256) trace_gate(
    const u32* batch, const bf16* gate, float* output, u32 heads, u32 width, u32 layer, u32 layers) {
    grid_dependency_synchronize();
    u64 head = (u64)blockIdx.x * 8 + threadIdx.x / 32;
    u32 lane = threadIdx.x % 32;
    if (head >= (u64)batch[TOKENS] * heads) return;
    float sum = 0.0f;
    if (segment_word(batch, owner(batch, (u32)(head / heads)), LENGTH) == 1) {
        for (u32 i = lane; i < width; i += 32) sum += sigmoid(widen(gate[head * width + i]));
    }
    sum = warp_sum(sum);
    u64 row = head / heads;
    if (lane == 0) output[(row * layers + layer) * heads + head % heads] = sum / (float)width;
}
ENTRY(trace_gate)
