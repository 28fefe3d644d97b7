// Converts weights that are not stored in bf16, once, for products on tensor cores.
#include "shared/kernel.h"
#include "shared/weight.h"

// 256 elements per block.
//   weight  [count] of the format
//   output  [..] bf16; elements `first` to `first + count` are written
extern "C" __global__ void __launch_bounds__(256) convert(
    const void* weight, u32 format, bf16* output, u64 first, u64 count) {
    grid_dependency_synchronize();
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i < count) output[first + i] = narrow(weight_at(weight, format, i));
}
ENTRY(convert)
