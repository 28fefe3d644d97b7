// `experts` where a tile is up to sixteen places of one expert: 32 outputs (x) of tile y.

// #import experts
// #import shared/product_many

@compute @workgroup_size(256)
fn experts_many(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let expert = groups[1u + 3u * group.y];
    if (group.y >= groups[0] || expert - params.first_expert >= params.experts) {
        return;
    }
    let begin = groups[2u + 3u * group.y];
    let to = groups[3u + 3u * group.y];
    var row = NO_ROW;
    if (begin + thread / 16u < to) {
        row = source(place(begin + thread / 16u));
    }
    var tile = product_many(product(expert), row, group.x * OUTPUTS_A_GROUP, thread);
    if (thread % 8u == 0u) {
        for (var r = 0u; r < 4u; r++) {
            let at = begin + tile_row(thread) + r;
            if (at < to) {
                put(place(at), group.x * OUTPUTS_A_GROUP + tile_output(thread), tile.sums[r]);
            }
        }
    }
}
