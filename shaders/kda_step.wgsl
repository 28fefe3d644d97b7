// The gated delta rule one token at a time, with gates that were computed before.

// #import shared/kda_step

@group(0) @binding(3) var<storage, read> gates: array<f32>;           // [T, H K]
@group(0) @binding(4) var<storage, read> beta: array<f32>;            // [T, H]

fn log_decay(row: u32, head: u32, d: u32) -> f32 {
    return gates[gates_at(row, head) + d];
}

fn write_strength(row: u32, head: u32) -> f32 {
    return beta[row * params.heads + head];
}

@compute @workgroup_size(64)
fn kda_step(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    step_segment(group, thread);
}
