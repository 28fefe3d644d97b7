// The gates of a KDA layer: log decay per channel and write strength per head. Counterpart of `src/backend/cpu/kda_gates.rs`.

// #import shared/batch
// #import shared/index
// #import shared/activations

struct Params {
    channels: u32,  // H K
    heads: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> decay: array<f32>;         // [T, H K]
@group(0) @binding(3) var<storage, read> write: array<f32>;         // [T, H]
@group(0) @binding(4) var<storage, read> a_log: array<f32>;         // [H]
@group(0) @binding(5) var<storage, read> dt_bias: array<f32>;       // [H K]
@group(0) @binding(6) var<storage, read_write> gates: array<f32>;   // [T, H K]
@group(0) @binding(7) var<storage, read_write> beta: array<f32>;    // [T, H]

// g = -exp(A_log[h]) softplus(decay + dt_bias), unbounded below; beta = sigmoid(write). One thread per channel and token.
@compute @workgroup_size(64)
fn kda_gates(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let i = flat(group, groups, thread);
    let row = i / params.channels;
    let c = i % params.channels;
    if (row >= batch[TOKENS]) {
        return;
    }
    let head = c / (params.channels / params.heads);
    gates[i] = -exp(a_log[head]) * softplus(decay[i] + dt_bias[c]);
    if (c < params.heads) {
        let at = row * params.heads + c;
        beta[at] = sigmoid(write[at]);
    }
}
