// The mean output gate of each head. Counterpart of `trace_gate` in `src/backend/cpu/trace.rs`.
//
// Rows of segments that are not single tokens are zero.

// #import shared/batch
// #import shared/sums
// #import shared/activations

struct Params {
    heads: u32,
    width: u32,   // V
    layer: u32,
    layers: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> gate: array<f32>;           // [T, H V], before the sigmoid
@group(0) @binding(3) var<storage, read_write> output: array<f32>;   // [T, layers, H]

// One workgroup per token (x) and head (y).
@compute @workgroup_size(64)
fn trace_gate(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let at = group.x * params.heads + group.y;
    var sum = 0.0;
    if (segment_word(owner(group.x), LENGTH) == 1u) {
        for (var i = thread; i < params.width; i += 64u) {
            sum += sigmoid(gate[at * params.width + i]);
        }
    }
    sum = sum_all(sum, thread);
    if (thread == 0u) {
        output[(group.x * params.layers + params.layer) * params.heads + group.y] = sum / f32(params.width);
    }
}
