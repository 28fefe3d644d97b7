// The token embedding: one row of the weight per token. Counterpart of `src/backend/cpu/embed.rs`.

// #import shared/batch
// #import shared/index
// #import shared/weight

struct Params {
    width: u32,
    stride: u32,     // vectors per row of `weight`
    first_row: u32,  // the first row of the vocabulary in this buffer
    rows: u32,
    vocabulary: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> weight: array<vec4<u32>>;     // [rows, stride]
@group(0) @binding(3) var<storage, read_write> output: array<f32>;     // [T, width]
@group(0) @binding(4) var<storage, read> drawn: array<u32>;            // [draws, 2]: tokens that the submission before drew, and their logits

@compute @workgroup_size(64)
fn embed(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let i = flat(group, groups, thread);
    let t = i / params.width;
    if (t >= batch[TOKENS]) {
        return;
    }
    var token = batch[batch[AT_TOKENS] + t];
    if ((token & FED) != 0u) {
        // A draw without a token has no row.
        token = min(drawn[2u * (token ^ FED)], params.vocabulary - 1u);
    }
    let row = token - params.first_row;
    if (row < params.rows) {
        output[i] = element(row * params.stride, i % params.width);
    }
}
