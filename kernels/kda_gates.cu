// The gates of a KDA layer: log decay per channel and write strength per head. Counterpart of src/backend/cpu/kda_gates.rs.
#include "shared/kernel.h"
#include "shared/batch.h"
#include "shared/weight.h"

// gates = -exp(a_log[h]) softplus(decay + dt_bias), no lower bound; beta = sigmoid(write). 256 channels per block.
//   batch    the batch
//   decay    [T, heads * key_width] bf16
//   write    [T, heads] bf16
//   a_log    [heads] of its format
//   dt_bias  [heads * key_width] of its format
//   gates    [T, heads * key_width] f32
//   beta     [T, heads] f32
extern "C" __global__ void __launch_bounds__(256) kda_gates(
    const u32* batch, const bf16* decay, const bf16* write, const void* a_log, u32 a_log_format, const void* dt_bias,
    u32 dt_bias_format, float* gates, float* beta, u32 heads, u32 key_width) {
    grid_dependency_synchronize();
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    u32 channels = heads * key_width;
    if (i >= (u64)batch[TOKENS] * channels) return;
    u64 row = i / channels;
    u32 channel = (u32)(i % channels), head = channel / key_width;
    float rate = -expf(weight_at(a_log, a_log_format, head));
    gates[i] = rate * softplus(widen(decay[i]) + weight_at(dt_bias, dt_bias_format, channel));
    if (channel % key_width == 0) beta[row * heads + head] = sigmoid(widen(write[row * heads + head]));
}
ENTRY(kda_gates)
