// The gates of a KDA layer: log decay per channel and write strength per head. Counterpart of src/backend/cpu/kda_gates.rs.
#include "shared/kernel.h"
#include "shared/batch.h"
#include "shared/weight.h"
#include "shared/params_kda.h"

// gates = -exp(a_log[h]) softplus(decay + dt_bias), no lower bound; beta = sigmoid(write). 256 channels per block.
extern "C" __global__ void __launch_bounds__(256) kda_gates(const KdaGatesParams p) {
    grid_dependency_synchronize();
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    u32 channels = p.heads * p.key_width;
    if (i >= (u64)p.batch[TOKENS] * channels) return;
    u64 row = i / channels;
    u32 channel = (u32)(i % channels), head = channel / p.key_width;
    float rate = -expf(weight_at(p.a_log, p.a_log_format, head));
    p.gates[i] = rate * softplus(widen(p.decay[i]) + weight_at(p.dt_bias, p.dt_bias_format, channel));
    if (channel % p.key_width == 0) p.beta[row * p.heads + head] = sigmoid(widen(p.write[row * p.heads + head]));
}
ENTRY(kda_gates)
