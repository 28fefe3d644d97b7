// Statistics of what a KDA layer will write to its states, for rows of single tokens. Counterpart of `trace_kda` in
// src/backend/cpu/trace.rs. It runs before the recurrence that it describes.
#include "shared/kernel.h"
#include "shared/batch.h"

// Numbers at the start of a record, in this order: the norms of the state after the token, of what is written and of the
// error that it corrects, the mean decay, the write strength. They are followed by the log decays.
#define NUMBERS 5

// One block of 128 threads per row (x) and head (y); rows of longer segments are zero. Writes the part of `layer`.
//   batch   the batch
//   qkv     [T, channels] bf16, channels = 2 key_heads key_width + heads value_width
//   gates   [T, heads * key_width] f32
//   beta    [T, heads] f32
//   states  [slots, heads, key_width, value_width] f32
//   output  [T, layers, heads, NUMBERS + key_width] f32
// Dynamic shared memory: 8 bytes per key channel.
extern "C" __global__ void __launch_bounds__(128) trace_kda(
    const u32* batch, const bf16* qkv, const float* gates, const float* beta, const float* states, float* output,
    u32 key_heads, u32 heads, u32 key_width, u32 value_width, u32 layer, u32 layers) {
    grid_dependency_synchronize();
    SHARED(float, scratch, 32);
    float* keys = (float*)dynamic_shared();
    float* decays = keys + key_width;
    u32 row = blockIdx.x, head = blockIdx.y, record = NUMBERS + key_width;
    if (row >= batch[TOKENS]) return;
    output += (((u64)row * layers + layer) * heads + head) * record;
    u32 segment = owner(batch, row);
    if (segment_word(batch, segment, LENGTH) != 1) {
        for (u32 i = threadIdx.x; i < record; i += blockDim.x) output[i] = 0.0f;
        return;
    }
    u32 slot = segment_word(batch, segment, SLOT_IN), key_head = head / (heads / key_heads);
    const bf16* channels = qkv + (u64)row * (2 * key_heads * key_width + heads * value_width);
    const bf16* key = channels + (key_heads + key_head) * key_width;
    const bf16* value = channels + 2 * key_heads * key_width + head * value_width;
    const float* gate = gates + ((u64)row * heads + head) * key_width;
    const float* state = states + ((u64)(slot == NONE ? 0 : slot) * heads + head) * key_width * value_width;
    float write = beta[(u64)row * heads + head];
    float squares = 0.0f, open = 0.0f;
    for (u32 d = threadIdx.x; d < key_width; d += blockDim.x) {
        output[NUMBERS + d] = gate[d];
        keys[d] = widen(key[d]);
        decays[d] = expf(gate[d]);
        squares += keys[d] * keys[d];
        open += decays[d];
    }
    squares = block_sum(squares, scratch);
    open = block_sum(open, scratch);
    float norm = sqrtf(squares + 1e-6f);
    for (u32 d = threadIdx.x; d < key_width; d += blockDim.x) keys[d] /= norm;
    __syncthreads();
    float errors = 0.0f, after = 0.0f;
    for (u32 e = threadIdx.x; e < value_width; e += blockDim.x) {
        float error = widen(value[e]);
        if (slot != NONE) {
            for (u32 d = 0; d < key_width; d++) error -= keys[d] * (decays[d] * state[(u64)d * value_width + e]);
        }
        errors += error * error;
        for (u32 d = 0; d < key_width; d++) {
            float decayed = slot == NONE ? 0.0f : decays[d] * state[(u64)d * value_width + e];
            float x = decayed + keys[d] * write * error;
            after += x * x;
        }
    }
    errors = sqrtf(block_sum(errors, scratch));
    after = sqrtf(block_sum(after, scratch));
    if (threadIdx.x == 0) {
        output[0] = after;
        output[1] = sqrtf(squares) / norm * write * errors;
        output[2] = errors;
        output[3] = open / (float)key_width;
        output[4] = write;
    }
}
ENTRY(trace_kda)
