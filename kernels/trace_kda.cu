// Statistics of what a KDA layer will write to its states, for rows of single tokens. Counterpart of `trace_kda` in
// src/backend/cpu/trace.rs. It runs before the recurrence that it describes.
#include "shared/kernel.h"
#include "shared/batch.h"
#include "shared/params_trace.h"

// Numbers at the start of a record, in this order: the norms of the state after the token, of what is written and of the
// error that it corrects, the mean decay, the write strength. They are followed by the log decays.
#define NUMBERS 5

// One block of 128 threads per row (x) and head (y); rows of longer segments are zero. Writes the part of `layer`.
// Dynamic shared memory: 8 bytes per key channel.
extern "C" __global__ void __launch_bounds__(128) trace_kda(const TraceKdaParams p) {
    grid_dependency_synchronize();
    SHARED(float, scratch, 32);
    float* keys = (float*)dynamic_shared();
    float* decays = keys + p.key_width;
    u32 row = blockIdx.x, head = blockIdx.y, record = NUMBERS + p.key_width;
    if (row >= p.batch[TOKENS]) return;
    float* output = p.output + (((u64)row * p.layers + p.layer) * p.heads + head) * record;
    u32 segment = owner(p.batch, row);
    if (segment_word(p.batch, segment, LENGTH) != 1) {
        for (u32 i = threadIdx.x; i < record; i += blockDim.x) output[i] = 0.0f;
        return;
    }
    u32 slot = segment_word(p.batch, segment, SLOT_IN), key_head = head / (p.heads / p.key_heads);
    const bf16* channels = p.qkv + (u64)row * (2 * p.key_heads * p.key_width + p.heads * p.value_width);
    const bf16* key = channels + (p.key_heads + key_head) * p.key_width;
    const bf16* value = channels + 2 * p.key_heads * p.key_width + head * p.value_width;
    const float* gate = p.gates + ((u64)row * p.heads + head) * p.key_width;
    const float* state = p.states + ((u64)(slot == NONE ? 0 : slot) * p.heads + head) * p.key_width * p.value_width;
    float write = p.beta[(u64)row * p.heads + head];
    float squares = 0.0f, open = 0.0f;
    for (u32 d = threadIdx.x; d < p.key_width; d += blockDim.x) {
        output[NUMBERS + d] = gate[d];
        keys[d] = widen(key[d]);
        decays[d] = expf(gate[d]);
        squares += keys[d] * keys[d];
        open += decays[d];
    }
    squares = block_sum(squares, scratch);
    open = block_sum(open, scratch);
    float norm = sqrtf(squares + 1e-6f);
    for (u32 d = threadIdx.x; d < p.key_width; d += blockDim.x) keys[d] /= norm;
    __syncthreads();
    float errors = 0.0f, after = 0.0f;
    for (u32 e = threadIdx.x; e < p.value_width; e += blockDim.x) {
        float error = widen(value[e]);
        if (slot != NONE) {
            for (u32 d = 0; d < p.key_width; d++) error -= keys[d] * (decays[d] * state[(u64)d * p.value_width + e]);
        }
        errors += error * error;
        for (u32 d = 0; d < p.key_width; d++) {
            float decayed = slot == NONE ? 0.0f : decays[d] * state[(u64)d * p.value_width + e];
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
        output[3] = open / (float)p.key_width;
        output[4] = write;
    }
}
ENTRY(trace_kda)
