// The token embedding: one row of the weight per token. Counterpart of src/backend/cpu/embed.rs.
#include "shared/kernel.h"
#include "shared/batch.h"
#include "shared/weight.h"

// output[t] = weight[tokens[t]]; one block of 128 threads per token.
//   batch   the batch
//   drawn   [draws, 2]: the tokens that the submission before drew, and their logits; unused if no token is fed
//   weight  [vocabulary, width] of the format
//   output  [T, width] bf16
extern "C" __global__ void __launch_bounds__(128) embed(
    const u32* batch, const u32* drawn, const void* weight, u32 format, bf16* output, u32 vocabulary, u32 width) {
    grid_dependency_synchronize();
    u32 t = blockIdx.x;
    if (t >= batch[TOKENS]) return;
    u32 token = batch[batch[AT_TOKENS] + t];
    // A draw without a token has no row.
    if (token & FED) token = min(drawn[2 * (token ^ FED)], vocabulary - 1);
    u64 from = (u64)token * width;
    for (u32 i = threadIdx.x; i < width; i += blockDim.x) {
        output[(u64)t * width + i] = narrow(weight_at(weight, format, from + i));
    }
}
ENTRY(embed)
