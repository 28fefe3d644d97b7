// The form for many rows: 32 rows by 64 outputs per workgroup of 256 threads, through workgroup memory.
//
// Eight threads, the lanes, share eight rows by eight outputs, so that sixteen loaded vectors are used in 64 sums. For each
// slice, the first half of each lane's elements goes through workgroup memory, then the second.

// #import shared/eights

const ROWS_A_TILE: u32 = 32u;
const OUTPUTS_A_TILE: u32 = 64u;

var<workgroup> inputs: array<vec4<f32>, 256>;   // [32 rows, 8 lanes]
var<workgroup> weights: array<vec4<f32>, 512>;  // [64 outputs, 8 lanes]

// Eight rows by four outputs: component o of `rN` is output o of row N.
struct Sums {
    r0: vec4<f32>,
    r1: vec4<f32>,
    r2: vec4<f32>,
    r3: vec4<f32>,
    r4: vec4<f32>,
    r5: vec4<f32>,
    r6: vec4<f32>,
    r7: vec4<f32>,
}

// A thread's results: eight outputs of one row.
struct Outputs {
    a: vec4<f32>,
    b: vec4<f32>,
}

const NO_ROW: u32 = 0xffffffffu;

// The row of the tile whose results this thread has, and the first of its eight outputs.
fn tile_row(thread: u32) -> u32 {
    return 8u * (thread / 8u % 4u) + thread % 8u;
}

fn tile_output(thread: u32) -> u32 {
    return 8u * (thread / 32u);
}

// Adds half a slice to the sums of eight rows by four outputs.
fn take_half(sums: Sums, rows: u32, outputs: u32) -> Sums {
    let w0 = weights[outputs];
    let w1 = weights[outputs + 8u];
    let w2 = weights[outputs + 16u];
    let w3 = weights[outputs + 24u];
    return Sums(
        fma_four(inputs[rows], w0, w1, w2, w3, sums.r0),
        fma_four(inputs[rows + 8u], w0, w1, w2, w3, sums.r1),
        fma_four(inputs[rows + 16u], w0, w1, w2, w3, sums.r2),
        fma_four(inputs[rows + 24u], w0, w1, w2, w3, sums.r3),
        fma_four(inputs[rows + 32u], w0, w1, w2, w3, sums.r4),
        fma_four(inputs[rows + 40u], w0, w1, w2, w3, sums.r5),
        fma_four(inputs[rows + 48u], w0, w1, w2, w3, sums.r6),
        fma_four(inputs[rows + 56u], w0, w1, w2, w3, sums.r7),
    );
}

// The sum of this thread's row over its eight lanes.
fn meet(sums: Sums, thread: u32) -> vec4<f32> {
    var all = array<vec4<f32>, 8>(
        sum_eight(sums.r0, thread),
        sum_eight(sums.r1, thread),
        sum_eight(sums.r2, thread),
        sum_eight(sums.r3, thread),
        sum_eight(sums.r4, thread),
        sum_eight(sums.r5, thread),
        sum_eight(sums.r6, thread),
        sum_eight(sums.r7, thread),
    );
    return all[thread % 8u];
}

// The dot products of row `tile_row` with outputs `first + tile_output` and the seven after it. `row` is the offset of the
// row that this thread loads with `input_eight` (row `thread / 8` of the tile), or NO_ROW.
fn product_many(product: Product, row: u32, first: u32, thread: u32) -> Outputs {
    let lane = thread % 8u;
    let rows = 64u * (thread / 8u % 4u) + lane;
    let outputs = 64u * (thread / 32u) + lane;
    let zero = Sums(vec4<f32>(0.0), vec4<f32>(0.0), vec4<f32>(0.0), vec4<f32>(0.0), vec4<f32>(0.0), vec4<f32>(0.0), vec4<f32>(0.0), vec4<f32>(0.0));
    var near = zero;
    var far = zero;
    for (var slice = 0u; slice * 64u < product.columns; slice++) {
        let eighth = 8u * slice + lane;
        var x = Eight(vec4<f32>(0.0), vec4<f32>(0.0));
        if (row != NO_ROW) {
            x = input_eight(row, 8u * eighth, product.columns);
        }
        let w = weight_eight(product, first + thread / 8u, eighth);
        let v = weight_eight(product, first + 32u + thread / 8u, eighth);
        workgroupBarrier();
        inputs[thread] = x.a;
        weights[thread] = w.a;
        weights[256u + thread] = v.a;
        workgroupBarrier();
        near = take_half(near, rows, outputs);
        far = take_half(far, rows, outputs + 32u);
        workgroupBarrier();
        inputs[thread] = x.b;
        weights[thread] = w.b;
        weights[256u + thread] = v.b;
        workgroupBarrier();
        near = take_half(near, rows, outputs);
        far = take_half(far, rows, outputs + 32u);
    }
    return Outputs(meet(near, thread), meet(far, thread));
}
