// `experts` if a tile is up to 32 assignments of one expert: 64 outputs (x) of tile y.

// #import experts
// #import shared/product_many

@compute @workgroup_size(256)
fn experts_many(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let expert = groups[1u + 3u * group.y];
    if (group.y >= groups[0] || expert - params.first_expert >= params.experts) {
        return;
    }
    let begin = groups[2u + 3u * group.y];
    let end = groups[3u + 3u * group.y];
    let first = group.x * OUTPUTS_A_TILE;
    var row = NO_ROW;
    if (begin + thread / 8u < end) {
        row = source(assignment(begin + thread / 8u));
    }
    let made = product_many(product(expert), row, first, thread);
    let at = begin + tile_row(thread);
    if (at < end) {
        put(assignment(at), first + tile_output(thread), made.a);
        put(assignment(at), first + tile_output(thread) + 4u, made.b);
    }
}
