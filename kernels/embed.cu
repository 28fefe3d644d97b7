// The token embedding: one row of the weight per token. Counterpart of src/backend/cpu/embed.rs.
#include "shared/kernel.h"
#include "shared/batch.h"
#include "shared/weight.h"
#include "shared/params_rows.h"

// output[t] = weight[tokens[t]]; one block of 128 threads per token.
extern "C" __global__ void __launch_bounds__(128) embed(const EmbedParams p) {
    grid_dependency_synchronize();
    u32 t = blockIdx.x;
    if (t >= p.batch[TOKENS]) return;
    u32 token = p.batch[p.batch[AT_TOKENS] + t];
    // A draw without a token has no row.
    if (token & FED) token = min(p.drawn[2 * (token ^ FED)], p.vocabulary - 1);
    u64 from = (u64)token * p.width;
    for (u32 i = threadIdx.x; i < p.width; i += blockDim.x) {
        p.output[(u64)t * p.width + i] = narrow(weight_at(p.weight, p.format, from + i));
    }
}
ENTRY(embed)
