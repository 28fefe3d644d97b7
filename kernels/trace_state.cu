// One head's state after a single token. Counterpart of `trace_state` in src/backend/cpu/traced.rs. It runs after the
// recurrence; without the copy, the states of all heads of the layer would have to be read back.
#include "shared/kernel.h"
#include "shared/batch.h"

// One thread per element (x) of a row (y), 256 per block; rows of longer segments are zero.
//   batch   the batch
//   states  [slots, heads, size] f32, size = key_width * value_width
//   output  [T, size] f32
extern "C" __global__ void __launch_bounds__(256) trace_state(
    const u32* batch, const float* states, float* output, u32 heads, u32 head, u32 size) {
    grid_dependency_synchronize();
    u32 row = blockIdx.y, at = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= batch[TOKENS] || at >= size) return;
    u32 segment = owner(batch, row);
    float value = 0.0f;
    if (segment_word(batch, segment, LENGTH) == 1) {
        value = states[((u64)segment_word(batch, segment, SLOT_OUT) * heads + head) * size + at];
    }
    output[(u64)row * size + at] = value;
}
ENTRY(trace_state)
