// The root mean square norm of a row, and the residual sum before it.
#pragma once
#include "weight.h"

// output = input / sqrt(mean(input^2) + eps) * weight, by a block of 256 threads; `scratch` as for `block_sum`. Thread t has
// the elements t, t + 256, ..
static __device__ __forceinline__ void normalise(
    const bf16* input, const void* weight, u32 format, bf16* output, u32 width, float eps, float* scratch) {
    float squares = 0.0f;
    for (u32 i = threadIdx.x; i < width; i += 256) {
        float x = widen(input[i]);
        squares += x * x;
    }
    float scale = 1.0f / sqrtf(block_sum(squares, scratch) / (float)width + eps);
    for (u32 i = threadIdx.x; i < width; i += 256) {
        output[i] = narrow(widen(input[i]) * scale * weight_at(weight, format, i));
    }
}

// target += source, then its norm, by a block of 256 threads. A thread normalises the elements that it summed.
static __device__ __forceinline__ void add_normalise(
    const bf16* source, bf16* target, const void* weight, u32 format, bf16* output, u32 width, float eps, float* scratch) {
    for (u32 i = threadIdx.x; i < width; i += 256) target[i] = narrow(widen(target[i]) + widen(source[i]));
    normalise(target, weight, format, output, width, eps, scratch);
}
