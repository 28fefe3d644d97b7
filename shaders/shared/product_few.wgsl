// The form for few rows: one row and 32 outputs per workgroup of 64 threads, weights read directly from memory.

// #import shared/eights

const OUTPUTS_A_GROUP: u32 = 32u;

// Outputs `first .. first + 4` of the row that begins at `row`, for eight threads with the same arguments.
fn product_few(product: Product, row: u32, first: u32, thread: u32) -> vec4<f32> {
    let lane = thread % 8u;
    var sum = vec4<f32>(0.0);
    for (var slice = 0u; slice * 64u < product.columns; slice++) {
        let eighth = 8u * slice + lane;
        let x = input_eight(row, 8u * eighth, product.columns);
        let w0 = weight_eight(product, first, eighth);
        let w1 = weight_eight(product, first + 1u, eighth);
        let w2 = weight_eight(product, first + 2u, eighth);
        let w3 = weight_eight(product, first + 3u, eighth);
        sum = fma_four(x.a, w0.a, w1.a, w2.a, w3.a, sum);
        sum = fma_four(x.b, w0.b, w1.b, w2.b, w3.b, sum);
    }
    return sum_eight(sum, thread);
}
