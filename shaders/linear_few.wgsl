// `linear` for few rows: the workgroup (x, y) computes 32 outputs of row y.

// #import linear
// #import shared/product_few

@compute @workgroup_size(64)
fn linear_few(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let first = group.x * OUTPUTS_A_GROUP + 4u * (thread / 8u);
    let sums = product_few(product(), group.y * params.columns, first, thread);
    if (thread % 8u == 0u) {
        put(group.y, first, sums);
    }
}
