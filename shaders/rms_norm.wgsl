// Root mean square normalisation, one workgroup per row. Counterpart of `src/backend/cpu/rms_norm.rs`.

// #import shared/batch
// #import shared/sums

struct Params {
    width: u32,
    eps: f32,
    rows: u32,    // the header word with the number of rows
    gather: u32,  // 1 if output row i reads the input row of the batch's output i
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> input: array<f32>;          // [T, width]
@group(0) @binding(3) var<storage, read> weight: array<f32>;         // [width]
@group(0) @binding(4) var<storage, read_write> output: array<f32>;   // [rows, width]

@compute @workgroup_size(64)
fn rms_norm(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let width = params.width;
    var row = group.x;
    if (params.gather == 1u) {
        row = batch[batch[AT_OUTPUTS] + OUTPUT_WORDS * group.x + OUTPUT_ROW];
    }
    var sum = 0.0;
    for (var i = thread; i < width; i += 64u) {
        let x = input[row * width + i];
        sum = fma(x, x, sum);
    }
    let scale = 1.0 / sqrt(sum_all(sum, thread) / f32(width) + params.eps);
    for (var i = thread; i < width; i += 64u) {
        output[group.x * width + i] = input[row * width + i] * scale * weight[i];
    }
}
