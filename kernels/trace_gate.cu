// The mean output gate of each head, for rows of single tokens. Counterpart of `trace_gate` in src/backend/cpu/trace.rs.
#include "shared/kernel.h"
#include "shared/batch.h"
#include "shared/params_trace.h"

// output = mean over a head of sigmoid(gate), 0 for rows of longer segments; one warp per head, eight per block.
// Writes the part of `layer`.
extern "C" __global__ void __launch_bounds__(256) trace_gate(const TraceGateParams p) {
    grid_dependency_synchronize();
    u64 head = (u64)blockIdx.x * 8 + threadIdx.x / 32;
    u32 lane = threadIdx.x % 32;
    if (head >= (u64)p.batch[TOKENS] * p.heads) return;
    float sum = 0.0f;
    if (segment_word(p.batch, owner(p.batch, (u32)(head / p.heads)), LENGTH) == 1) {
        for (u32 i = lane; i < p.width; i += 32) sum += sigmoid(widen(p.gate[head * p.width + i]));
    }
    sum = warp_sum(sum);
    u64 row = head / p.heads;
    if (lane == 0) p.output[(row * p.layers + p.layer) * p.heads + head % p.heads] = sum / (float)p.width;
}
ENTRY(trace_gate)
