// Sorts the assignments of a batch by expert and cuts each expert's list into tiles: a part of `experts`. One workgroup.
//
// The order of assignments within an expert is undefined: each is computed separately.

// #import shared/batch

struct Params {
    top_k: u32,
    first_expert: u32,  // the id of the first local expert
    experts: u32,       // number of local experts
    tile: u32,          // assignments per tile
    most_tiles: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> ids: array<u32>;             // [T, top_k]
@group(0) @binding(3) var<storage, read_write> groups: array<u32>;    // count, [most_tiles, 3]: expert, from, to; assignments

// Maximum number of local experts.
const EXPERTS: u32 = 1024u;

var<workgroup> counts: array<atomic<u32>, EXPERTS>;
var<workgroup> starts: array<u32, EXPERTS>;
var<workgroup> tiles: array<u32, EXPERTS>;

@compute @workgroup_size(256)
fn experts_group(@builtin(local_invocation_index) thread: u32) {
    let assignments = batch[TOKENS] * params.top_k;
    for (var e = thread; e < params.experts; e += 256u) {
        atomicStore(&counts[e], 0u);
    }
    workgroupBarrier();
    for (var i = thread; i < assignments; i += 256u) {
        let e = ids[i] - params.first_expert;
        if (e < params.experts) {
            atomicAdd(&counts[e], 1u);
        }
    }
    workgroupBarrier();
    if (thread == 0u) {
        var start = 0u;
        var tile = 0u;
        for (var e = 0u; e < params.experts; e++) {
            let count = atomicLoad(&counts[e]);
            starts[e] = start;
            tiles[e] = tile;
            start += count;
            tile += (count + params.tile - 1u) / params.tile;
        }
        groups[0] = tile;
    }
    workgroupBarrier();
    for (var e = thread; e < params.experts; e += 256u) {
        let end = starts[e] + atomicLoad(&counts[e]);
        var at = 1u + 3u * tiles[e];
        for (var begin = starts[e]; begin < end; begin += params.tile) {
            groups[at] = e;
            groups[at + 1u] = begin;
            groups[at + 2u] = min(end, begin + params.tile);
            at += 3u;
        }
        // From here on: the next free index of the expert's list.
        atomicStore(&counts[e], starts[e]);
    }
    workgroupBarrier();
    for (var i = thread; i < assignments; i += 256u) {
        let e = ids[i] - params.first_expert;
        if (e < params.experts) {
            groups[1u + 3u * params.most_tiles + atomicAdd(&counts[e], 1u)] = i;
        }
    }
}
