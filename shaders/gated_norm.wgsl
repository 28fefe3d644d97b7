// The output gate of a KDA layer: a norm over each head, times a sigmoid gate. Counterpart of `src/backend/cpu/gated_norm.rs`.

// #import shared/sums
// #import shared/activations

struct Params {
    heads: u32,
    width: u32,  // V
    eps: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> input: array<f32>;          // [T, H V]
@group(0) @binding(3) var<storage, read> gate: array<f32>;           // [T, H V], before the sigmoid
@group(0) @binding(4) var<storage, read> weight: array<f32>;         // [V]
@group(0) @binding(5) var<storage, read_write> output: array<f32>;   // [T, H V]

// One workgroup per token (x) and head (y).
@compute @workgroup_size(64)
fn gated_norm(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let first = (group.x * params.heads + group.y) * params.width;
    var sum = 0.0;
    for (var i = thread; i < params.width; i += 64u) {
        let x = input[first + i];
        sum = fma(x, x, sum);
    }
    let scale = 1.0 / sqrt(sum_all(sum, thread) / f32(params.width) + params.eps);
    for (var i = thread; i < params.width; i += 64u) {
        output[first + i] = input[first + i] * scale * weight[i] * sigmoid(gate[first + i]);
    }
}
