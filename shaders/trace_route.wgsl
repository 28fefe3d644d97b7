// The experts that a layer chose. Counterpart of `trace_route` in `src/backend/cpu/trace.rs`.
//
// Rows of segments that are not single tokens are zero.

// #import shared/batch

struct Params {
    top: u32,
    layer: u32,
    layers: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> experts: array<u32>;         // [T, top]
@group(0) @binding(3) var<storage, read> weights: array<f32>;         // [T, top]
@group(0) @binding(4) var<storage, read_write> output: array<f32>;    // [T, layers, 2, top]: experts, then weights

// One workgroup per row (x).
@compute @workgroup_size(64)
fn trace_route(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = group.x;
    let at = (row * params.layers + params.layer) * 2u * params.top;
    let single = segment_word(owner(row), LENGTH) == 1u;
    for (var i = thread; i < params.top; i += 64u) {
        output[at + i] = select(0.0, f32(experts[row * params.top + i]), single);
        output[at + params.top + i] = select(0.0, weights[row * params.top + i], single);
    }
}
