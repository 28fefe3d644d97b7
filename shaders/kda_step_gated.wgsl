// The gated delta rule one token at a time, with the gates of its tokens: `kda_gates` and `kda_step` in one dispatch.

// #import shared/kda_step
// #import shared/activations

@group(0) @binding(3) var<storage, read> decay: array<f32>;           // [T, H K]
@group(0) @binding(4) var<storage, read> write: array<f32>;           // [T, H]
@group(0) @binding(7) var<storage, read> a_log: array<f32>;           // [H]
@group(0) @binding(8) var<storage, read> dt_bias: array<f32>;         // [H K]

fn log_decay(row: u32, head: u32, d: u32) -> f32 {
    return -exp(a_log[head]) * softplus(decay[gates_at(row, head) + d] + dt_bias[head * params.key_width + d]);
}

fn write_strength(row: u32, head: u32) -> f32 {
    return sigmoid(write[row * params.heads + head]);
}

@compute @workgroup_size(64)
fn kda_step_gated(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    step_segment(group, thread);
}
