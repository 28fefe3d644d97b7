// Keys and values of a window of positions, expanded from their latents: a part of `mla_prefill`.

// #import shared/batch
// #import shared/mla
// #import shared/weight
// #import shared/product
// #import shared/product_many

@group(0) @binding(2) var<storage, read> input: array<f32>;            // latents: [blocks, block_tokens, latent + rope]
@group(0) @binding(3) var<storage, read> weight: array<vec4<u32>>;     // kv_b: [rows, stride]
@group(0) @binding(4) var<storage, read_write> output: array<f32>;     // [window, H (nope + value)]

// 32 of kv_b's rows (x) by 16 positions (y). `params.begin` is the window's number.
@compute @workgroup_size(256)
fn mla_expand(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let window = batch[AT_WINDOWS] + 4u * params.begin;
    let piece = batch[window];
    let count = batch[window + 2u];
    let first = group.y * ROWS_A_TILE;
    let mine = first + thread / 16u;
    var row = NO_ROW;
    if (mine < count) {
        row = latent_at(piece, batch[window + 1u] + mine);
    }
    let product = Product(params.latent, params.stride, 0u, params.rows);
    var tile = product_many(product, row, group.x * OUTPUTS_A_GROUP, thread);
    if (thread % 8u == 0u) {
        let width = params.heads * (params.nope + params.value);
        for (var r = 0u; r < 4u; r++) {
            let n = first + tile_row(thread) + r;
            for (var o = 0u; o < 4u; o++) {
                let at = group.x * OUTPUTS_A_GROUP + tile_output(thread) + o;
                if (n < count && at < params.rows) {
                    output[n * width + params.first_row + at] = tile.sums[r][o];
                }
            }
        }
    }
}
