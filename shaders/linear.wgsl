// `output = input weight^T`. Counterpart of `src/backend/cpu/linear.rs`.

// #import shared/batch
// #import shared/weight
// #import shared/product
// #import shared/input

struct Params {
    columns: u32,
    stride: u32,   // vectors per row of `weight`
    outputs: u32,  // rows of `weight` in this buffer
    first: u32,    // the output of the first of these rows
    width: u32,    // outputs of the whole weight
    rows: u32,     // the header word with the number of rows
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> input: array<f32>;          // [rows, columns]
@group(0) @binding(3) var<storage, read> weight: array<vec4<u32>>;   // [outputs, stride]
@group(0) @binding(4) var<storage, read_write> output: array<f32>;   // [rows, width]

fn product() -> Product {
    return Product(params.columns, params.stride, 0u, params.outputs);
}

fn put(row: u32, first: u32, values: vec4<f32>) {
    for (var i = 0u; i < 4u; i++) {
        if (first + i < params.outputs) {
            output[row * params.width + params.first + first + i] = values[i];
        }
    }
}
