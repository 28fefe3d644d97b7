// Converts weights that are not stored in bf16, once, for products on tensor cores.
#include "shared/kernel.h"
#include "shared/weight.h"
#include "shared/params_rows.h"

// 256 elements per block.
extern "C" __global__ void __launch_bounds__(256) convert(const ConvertParams p) {
    grid_dependency_synchronize();
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i < p.count) p.output[p.first + i] = narrow(weight_at(p.weight, p.format, i));
}
ENTRY(convert)
