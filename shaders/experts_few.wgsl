// `experts` if a tile is a single assignment: 32 outputs (x) of tile y.

// #import experts
// #import shared/product_few

@compute @workgroup_size(64)
fn experts_few(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let expert = groups[1u + 3u * group.y];
    if (group.y >= groups[0] || expert - params.first_expert >= params.experts) {
        return;
    }
    let mine = assignment(groups[2u + 3u * group.y]);
    let first = group.x * OUTPUTS_A_GROUP + 4u * (thread / 8u);
    let sums = product_few(product(expert), source(mine), first, thread);
    if (thread % 8u == 0u) {
        put(mine, first, sums);
    }
}
