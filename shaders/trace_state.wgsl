// One head's state after a single token. Counterpart of `trace_state` in `src/backend/cpu/trace.rs`.
//
// Runs after the recurrence; without the copy, the states of all heads of the layer would have to be read back. Rows of
// segments that are not single tokens are zero.

// #import shared/batch

struct Params {
    heads: u32,
    head: u32,
    size: u32,  // K V
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> states: array<f32>;          // [slots, H, K, V]
@group(0) @binding(3) var<storage, read_write> output: array<f32>;    // [T, K V]

// One thread per element (x) of a row (y).
@compute @workgroup_size(64)
fn trace_state(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let at = group.x * 64u + thread;
    if (at >= params.size) {
        return;
    }
    let segment = owner(group.y);
    var value = 0.0;
    if (segment_word(segment, LENGTH) == 1u) {
        value = states[(segment_word(segment, SLOT_OUT) * params.heads + params.head) * params.size + at];
    }
    output[group.y * params.size + at] = value;
}
