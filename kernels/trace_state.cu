// One head's state after a single token. Counterpart of `trace_state` in src/backend/cpu/traced.rs. It runs after the
// recurrence; without the copy, the states of all heads of the layer would have to be read back.
#include "shared/kernel.h"
#include "shared/batch.h"
#include "shared/params_trace.h"

// One thread per element (x) of a row (y), 256 per block; rows of longer segments are zero.
extern "C" __global__ void __launch_bounds__(256) trace_state(const TraceStateParams p) {
    grid_dependency_synchronize();
    u32 row = blockIdx.y, at = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= p.batch[TOKENS] || at >= p.size) return;
    u32 segment = owner(p.batch, row);
    float value = 0.0f;
    if (segment_word(p.batch, segment, LENGTH) == 1) {
        value = p.states[((u64)segment_word(p.batch, segment, SLOT_OUT) * p.heads + p.head) * p.size + at];
    }
    p.output[(u64)row * p.size + at] = value;
}
ENTRY(trace_state)
