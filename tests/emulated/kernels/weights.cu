// Elements of a weight as other kernels read them.
#include "shared/kernel.h"
#include "shared/weight.h"

// output[0] each alone, output[1] eight at a time; one warp.
//   weight  [count] of the format, in rows of `columns`
//   output  [2, count] f32
extern "C" __global__ void try_weights(const void* weight, u32 format, float* output, u32 columns, u32 count) {
    grid_dependency_synchronize();
    for (u32 i = 8 * threadIdx.x; i < count; i += 8 * 32) {
        float x[8];
        weights_at(weight, format, i, columns, i % columns, x);
        for (u32 j = 0; j < 8; j++) {
            output[i + j] = weight_at(weight, format, i + j);
            output[count + i + j] = x[j];
        }
    }
}
ENTRY(try_weights)
