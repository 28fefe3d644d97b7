// The header that every kernel includes: CUDA C++ with a few names for instructions that need PTX, compiled by NVRTC or, for
// tests, by a host C++ compiler. `device.h` defines the instructions, `host.h` emulates them on a CPU.
//
// Rules for kernels with both compilers:
//   - no other headers: NVRTC has none of the host's;
//   - blocks are one-dimensional, of a multiple of 32 threads;
//   - shared memory is `SHARED(type, name, count)` or `dynamic_shared()`, whose size is set by the launch; none of it is
//     defined before it is written, and no thread sees another's writes before a barrier;
//   - no result may depend on the order in which threads run between barriers: no floating-point atomics;
//   - each entry point is `extern "C" __global__` and named behind its definition by `ENTRY(name)`;
//   - it takes one struct by value, `const NAMEParams p`, which `src/backend/cuda/params` defines with the meaning of each field
//     (`params_*.h` are generated from there);
//   - the struct is `__grid_constant__` where the compiler would otherwise load all of it at the start and spill registers;
//   - its first statement is `grid_dependency_synchronize()`: it may start before the kernels in front of it have ended.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// An activation, a weight or a cached latent: the upper half of an f32.
struct bf16 {
    u16 bits;
};

// All lanes of a warp.
#define EVERY_LANE 0xffffffffu
#include "shared/layout.h"

#ifdef __CUDACC__
#include "device.h"
#else
#include "host.h"
#endif

#define INFINITE __uint_as_float(0x7f800000u)
#define NOT_A_NUMBER __uint_as_float(0x7fffffffu)

// bf16 -> f32, exact.
static __device__ __forceinline__ float widen(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
// The two bf16 of a word, widened; the lower half is the element of the lower address.
static __device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
static __device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
// Two f32 rounded to a word of two bf16, `a` at the lower address. `narrow` (f32 -> bf16, to nearest even) and
// `narrow_pair` are instructions.
static __device__ __forceinline__ u32 pair_of(bf16 a, bf16 b) { return (u32)a.bits | (u32)b.bits << 16; }

// Sum and maximum over a warp, the same bits in every lane: a butterfly adds in the same tree in every lane.
static __device__ __forceinline__ float warp_sum(float x) {
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(EVERY_LANE, x, step);
    return x;
}
static __device__ __forceinline__ float warp_max(float x) {
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(EVERY_LANE, x, step));
    return x;
}

// Sum over a block; `scratch` is 32 floats of shared memory, free again when this returns. Every thread must call it.
static __device__ __forceinline__ float block_sum(float x, float* scratch) {
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    float all = threadIdx.x % 32 < blockDim.x / 32 ? scratch[threadIdx.x % 32] : 0.0f;
    all = warp_sum(all);
    __syncthreads();
    return all;
}

// Uses approximate instructions. With e = 2^-22 for one of them and |x| / 2^24 for the rounding of an exponential's argument,
// the error is within 2 e + |x| / 2^24 of the result for sigmoid and silu; it is not greater for softplus below zero, where
// it is e^x, and smaller above. `tests/emulated` checks them to 1e-6 + |x| / 2^23.
static __device__ __forceinline__ float sigmoid(float x) { return reciprocal_near(1.0f + exp_near(-x)); }
static __device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }
// ln(1 + e^x), without overflow: with y = e^-|x| and s = y / (2 + y), ln(1 + y) = 2 artanh(s), whose even part is a
// polynomial of s^2, at most 1/9, to 8e-9.
static __device__ __forceinline__ float softplus(float x) {
    float y = exp_near(-fabsf(x)), s = y * reciprocal_near(2.0f + y), square = s * s;
    float even = fmaf(0.281577796f, square, 0.279651582f);
    even = fmaf(even, square, 0.400245965f);
    even = fmaf(even, square, 0.666663229f);
    even = fmaf(even, square, 2.0f);
    return fmaf(s, even, fmaxf(x, 0.0f));
}
