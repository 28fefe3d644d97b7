// Elements of a weight as other kernels read them.
#include "shared/kernel.h"
#include "shared/weight.h"

struct WeightsParams {
    const void* weight;  // [count] of the format, in rows of `columns`
    u32 format;
    float* output;       // [2, count]
    u32 columns, count;
};

// output[0] each alone, output[1] eight at a time; one warp.
extern "C" __global__ void try_weights(const WeightsParams p) {
    grid_dependency_synchronize();
    for (u32 i = 8 * threadIdx.x; i < p.count; i += 8 * 32) {
        float x[8];
        weights_at(p.weight, p.format, i, p.columns, i % p.columns, x);
        for (u32 j = 0; j < 8; j++) {
            p.output[i + j] = weight_at(p.weight, p.format, i + j);
            p.output[p.count + i + j] = x[j];
        }
    }
}
ENTRY(try_weights)
