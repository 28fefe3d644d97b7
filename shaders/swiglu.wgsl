// The gated activation of an MLP. Counterpart of `src/backend/cpu/swiglu.rs`.

// #import shared/batch
// #import shared/index
// #import shared/activations

struct Params {
    width: u32,
    rows: u32,  // the header word with the number of rows
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> input: array<f32>;          // [rows, 2 width]: gate, then up
@group(0) @binding(3) var<storage, read_write> output: array<f32>;   // [rows, width]

@compute @workgroup_size(64)
fn swiglu(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let i = flat(group, groups, thread);
    let row = i / params.width;
    if (row >= batch[params.rows]) {
        return;
    }
    let at = row * 2u * params.width + i % params.width;
    output[i] = silu(input[at]) * input[at + params.width];
}
