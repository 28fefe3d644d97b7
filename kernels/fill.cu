// Generates random numbers in weights and caches, to measure a model without its files. Counterpart of `src/backend/cpu/fill.rs`;
// the numbers are `Random::value` of `src/backend/random.rs`, to the bit.
#include "shared/kernel.h"
#include "shared/latents.h"
#include "shared/params_rows.h"

// Mixes the bits of a word.
static __device__ __forceinline__ u32 mix(u32 x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

// 4096 elements per block, 16 per thread.
extern "C" __global__ void __launch_bounds__(256) fill(const FillParams p) {
    grid_dependency_synchronize();
    u64 first = (u64)blockIdx.x * 4096 + threadIdx.x;
    for (u32 k = 0; k < 16; k++) {
        u64 i = first + k * 256;
        if (i >= p.count) return;
        u32 bits = mix(mix((u32)i ^ p.seed) + p.seed);
        // 24 bits in -1 .. 1, exactly; the scale is a power of two.
        float value = p.mean + p.scale * ((float)(bits >> 8) * 1.1920928955078125e-7f - 1.0f);
        if (p.format == FORMAT_F32) {
            ((float*)p.output)[i] = value;
        } else if (p.format == FORMAT_F16) {
            store_latent(((f16*)p.output)[i], value);
        } else {
            ((bf16*)p.output)[i] = narrow(value);
        }
    }
}
ENTRY(fill)
