// The form for many rows: 16 rows by 32 outputs a workgroup of 256 threads, slices of 64 columns in workgroup memory.

// #import shared/eights

const ROWS_A_TILE: u32 = 16u;
const OUTPUTS_A_GROUP: u32 = 32u;

var<workgroup> inputs: array<vec4<f32>, 256>;   // [16 rows, 16 vectors]
var<workgroup> weights: array<vec4<f32>, 512>;  // [32 outputs, 16 vectors]

// Four rows by four outputs; component `o` of `sums[r]` is output `o` of row `r`.
struct Tile {
    sums: array<vec4<f32>, 4>,
}

// The dot products of this thread's four rows and outputs (`tile_row`, `tile_output`), given to eight threads each.
// `row` is where the row of `input` begins that this thread loads (row `thread / 16` of the tile), NO_ROW if none.
fn product_many(product: Product, row: u32, first: u32, thread: u32) -> Tile {
    let lane = thread % 8u;
    let rows = 64u * (thread / 8u % 4u) + 2u * lane;
    let outputs = 64u * (thread / 32u) + 2u * lane;
    var s0 = vec4<f32>(0.0);
    var s1 = vec4<f32>(0.0);
    var s2 = vec4<f32>(0.0);
    var s3 = vec4<f32>(0.0);
    for (var slice = 0u; slice * 64u < product.columns; slice++) {
        workgroupBarrier();
        var x = vec4<f32>(0.0);
        let column = slice * 64u + thread % 16u * 4u;
        if (row != NO_ROW) {
            if (column + 4u <= product.columns) {
                let at = row + column;
                x = vec4<f32>(input[at], input[at + 1u], input[at + 2u], input[at + 3u]);
            } else {
                for (var i = 0u; column + i < product.columns; i++) {
                    x[i] = input[row + column + i];
                }
            }
        }
        inputs[thread] = x;
        let w = weight_eight(product, first + thread / 8u, 8u * slice + lane);
        weights[2u * thread] = w.a;
        weights[2u * thread + 1u] = w.b;
        workgroupBarrier();
        for (var half = 0u; half < 2u; half++) {
            let w0 = weights[outputs + half];
            let w1 = weights[outputs + 16u + half];
            let w2 = weights[outputs + 32u + half];
            let w3 = weights[outputs + 48u + half];
            s0 = fma_four(inputs[rows + half], w0, w1, w2, w3, s0);
            s1 = fma_four(inputs[rows + 16u + half], w0, w1, w2, w3, s1);
            s2 = fma_four(inputs[rows + 32u + half], w0, w1, w2, w3, s2);
            s3 = fma_four(inputs[rows + 48u + half], w0, w1, w2, w3, s3);
        }
    }
    return Tile(array<vec4<f32>, 4>(
        sum_eight(s0, thread),
        sum_eight(s1, thread),
        sum_eight(s2, thread),
        sum_eight(s3, thread),
    ));
}

const NO_ROW: u32 = 0xffffffffu;

// The first of this thread's four rows in the tile.
fn tile_row(thread: u32) -> u32 {
    return 4u * (thread / 8u % 4u);
}

// The first of this thread's four outputs in the group's 32.
fn tile_output(thread: u32) -> u32 {
    return 4u * (thread / 32u);
}
