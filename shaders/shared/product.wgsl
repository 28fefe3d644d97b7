// Rows times a weight's rows: the dot products of `linear`, `experts` and `mla_prefill`, and their one order of summation.
//
// Columns are cut into slices of 64. Lane l of eight processes elements 8 l .. 8 l + 8 of every slice, one after the other;
// the eight lanes are summed in `sum_eight`. Both forms below use this order, so a row's result does not depend on the number
// of rows. The including shader declares `weight`, FORMAT, THREADS and `input_eight` (`shared/input` if rows are f32), and
// passes the shapes in a `Product`.

struct Product {
    columns: u32,  // elements summed
    stride: u32,   // vectors from one row of the weight to the next
    base: u32,     // the vector at which the weight's first row begins
    outputs: u32,  // rows of the weight
}

// Eight elements of a weight's row, zero past its end.
fn weight_eight(product: Product, output: u32, eighth: u32) -> Eight {
    if (output < product.outputs && 8u * eighth < product.columns) {
        return eight(product.base + output * product.stride, eighth);
    }
    return Eight(vec4<f32>(0.0), vec4<f32>(0.0));
}

// `sum + x[0] w0 + x[1] w1 + ..` for four outputs at once, in this order.
fn fma_four(x: vec4<f32>, w0: vec4<f32>, w1: vec4<f32>, w2: vec4<f32>, w3: vec4<f32>, sum: vec4<f32>) -> vec4<f32> {
    var s = sum;
    s = fma(vec4<f32>(x.x), vec4<f32>(w0.x, w1.x, w2.x, w3.x), s);
    s = fma(vec4<f32>(x.y), vec4<f32>(w0.y, w1.y, w2.y, w3.y), s);
    s = fma(vec4<f32>(x.z), vec4<f32>(w0.z, w1.z, w2.z, w3.z), s);
    s = fma(vec4<f32>(x.w), vec4<f32>(w0.w, w1.w, w2.w, w3.w), s);
    return s;
}
