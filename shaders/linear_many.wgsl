// `linear` for many rows: the workgroup (x, y) computes 64 outputs of rows 32 y .. 32 y + 32.

// #import linear
// #import shared/product_many

@compute @workgroup_size(256)
fn linear_many(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let rows = batch[params.rows];
    let first_row = group.y * ROWS_A_TILE;
    let first = group.x * OUTPUTS_A_TILE;
    let loaded = first_row + thread / 8u;
    let made = product_many(product(), select(NO_ROW, loaded * params.columns, loaded < rows), first, thread);
    let row = first_row + tile_row(thread);
    if (row < rows) {
        put(row, first + tile_output(thread), made.a);
        put(row, first + tile_output(thread) + 4u, made.b);
    }
}
