// `linear` for many rows: the workgroup (x, y) makes 32 outputs of rows 16 y .. 16 y + 16.

// #import linear
// #import shared/product_many

@compute @workgroup_size(256)
fn linear_many(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let rows = batch[params.rows];
    let first_row = group.y * ROWS_A_TILE;
    let mine = first_row + thread / 16u;
    var tile = product_many(
        product(),
        select(NO_ROW, mine * params.columns, mine < rows),
        group.x * OUTPUTS_A_GROUP,
        thread,
    );
    if (thread % 8u == 0u) {
        for (var r = 0u; r < 4u; r++) {
            let row = first_row + tile_row(thread) + r;
            if (row < rows) {
                put(row, group.x * OUTPUTS_A_GROUP + tile_output(thread), tile.sums[r]);
            }
        }
    }
}
