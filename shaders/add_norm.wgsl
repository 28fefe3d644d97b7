// `target += source`, then the root mean square norm of the sum; one workgroup per row. The same order of operations as in
// `add.wgsl` and `rms_norm.wgsl`.

// #import shared/batch
// #import shared/sums

struct Params {
    width: u32,
    eps: f32,
    rows: u32,  // the header word with the number of rows
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> source: array<f32>;             // [rows, width]
@group(0) @binding(3) var<storage, read> weight: array<f32>;             // [width]
@group(0) @binding(4) var<storage, read_write> destination: array<f32>;  // [rows, width]
@group(0) @binding(5) var<storage, read_write> output: array<f32>;       // [rows, width]

@compute @workgroup_size(64)
fn add_norm(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let width = params.width;
    let row = group.x * width;
    var sum = 0.0;
    for (var i = thread; i < width; i += 64u) {
        let x = destination[row + i] + source[row + i];
        destination[row + i] = x;
        sum = fma(x, x, sum);
    }
    let scale = 1.0 / sqrt(sum_all(sum, thread) / f32(width) + params.eps);
    for (var i = thread; i < width; i += 64u) {
        output[row + i] = destination[row + i] * scale * weight[i];
    }
}
