// `target += source`.

// #import shared/batch
// #import shared/index

struct Params {
    width: u32,
    rows: u32,  // the header word with the number of rows
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> source: array<f32>;             // [rows, width]
@group(0) @binding(3) var<storage, read_write> destination: array<f32>;  // [rows, width]

@compute @workgroup_size(64)
fn add(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let i = flat(group, groups, thread);
    if (i / params.width < batch[params.rows]) {
        destination[i] += source[i];
    }
}
