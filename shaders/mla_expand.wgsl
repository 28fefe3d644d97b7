// Keys and values of a window of positions, expanded from their latents: a part of `mla_prefill`.

// #import shared/batch
// #import shared/mla
// #import shared/weight
// #import shared/product
// #import shared/product_many

@group(0) @binding(2) var<storage, read> latents: array<u32>;          // [blocks, block_tokens, latent + rope]
@group(0) @binding(3) var<storage, read> weight: array<vec4<u32>>;     // kv_b: [rows, stride]
@group(0) @binding(4) var<storage, read_write> output: array<f32>;     // [window, H (nope + value)]

// Eight elements of the cached row that begins at word `base`, zero from element `columns` on.
fn input_eight(base: u32, first: u32, columns: u32) -> Eight {
    if (first + 8u <= columns) {
        return Eight(latent_four(base, first), latent_four(base, first + 4u));
    }
    var values = Eight(vec4<f32>(0.0), vec4<f32>(0.0));
    for (var i = 0u; i < 4u; i++) {
        if (first + i < columns) {
            values.a[i] = latent_element(base, first + i);
        }
        if (first + 4u + i < columns) {
            values.b[i] = latent_element(base, first + 4u + i);
        }
    }
    return values;
}

// 64 of kv_b's rows (x) by 32 positions (y). `params.begin` is the window's index.
@compute @workgroup_size(256)
fn mla_expand(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let window = batch[AT_WINDOWS] + WINDOW_WORDS * params.begin;
    let segment = batch[window + WINDOW_SEGMENT];
    let count = batch[window + WINDOW_POSITIONS];
    let first = group.y * ROWS_A_TILE;
    let loaded = first + thread / 8u;
    var row = NO_ROW;
    if (loaded < count) {
        row = latent_at(segment, batch[window + WINDOW_FIRST] + loaded);
    }
    let product = Product(params.latent, params.stride, 0u, params.rows);
    let made = product_many(product, row, group.x * OUTPUTS_A_TILE, thread);
    let n = first + tile_row(thread);
    let at = group.x * OUTPUTS_A_TILE + tile_output(thread);
    let width = params.heads * (params.nope + params.value);
    for (var i = 0u; i < 4u; i++) {
        if (n < count && at + i < params.rows) {
            output[n * width + params.first_row + at + i] = made.a[i];
        }
        if (n < count && at + 4u + i < params.rows) {
            output[n * width + params.first_row + at + 4u + i] = made.b[i];
        }
    }
}
