// The sum of a token's experts, in the order of its choices and then the shared ones, and the activation inside each: parts of `experts`.

// #import shared/batch
// #import shared/index
// #import shared/activations

struct Params {
    width: u32,         // d, or n in `experts_activate`
    top_k: u32,
    first_expert: u32,  // the id of the first local expert
    experts: u32,       // number of local experts
    shared_too: u32,    // 1 if the result of shared experts is added
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> ids: array<u32>;            // [T, top_k]
@group(0) @binding(3) var<storage, read> weights: array<f32>;        // [T, top_k]
@group(0) @binding(4) var<storage, read> results: array<f32>;        // [assignments, d]
@group(0) @binding(5) var<storage, read_write> output: array<f32>;   // [T, d]
@group(0) @binding(6) var<storage, read> up: array<f32>;             // [assignments, n]
@group(0) @binding(7) var<storage, read_write> gate: array<f32>;     // [assignments, n]: becomes silu(gate) up
@group(0) @binding(8) var<storage, read> shared_result: array<f32>;  // [T, d], or any buffer

@compute @workgroup_size(64)
fn experts_combine(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let i = flat(group, groups, thread);
    let row = i / params.width;
    let c = i % params.width;
    if (row >= batch[TOKENS]) {
        return;
    }
    var sum = 0.0;
    for (var n = 0u; n < params.top_k; n++) {
        let assignment = row * params.top_k + n;
        if (ids[assignment] - params.first_expert < params.experts) {
            sum = fma(weights[assignment], results[assignment * params.width + c], sum);
        }
    }
    if (params.shared_too == 1u) {
        sum += shared_result[i];
    }
    output[i] = sum;
}

// Assignments to experts of other ranks are left undefined: no operation reads them.
@compute @workgroup_size(64)
fn experts_activate(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let i = flat(group, groups, thread);
    let assignment = i / params.width;
    if (assignment >= batch[TOKENS] * params.top_k || ids[assignment] - params.first_expert >= params.experts) {
        return;
    }
    gate[i] = silu(gate[i]) * up[i];
}
