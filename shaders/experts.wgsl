// The routed experts: places (a token and one of its choices) are grouped by expert, each group runs through its expert,
// and a token sums what its choices came to, in their order. Twin of `src/backend/cpu/experts.rs`.
//
// `experts_group` sorts, `experts_few` or `experts_many` multiply (gate, up, down, once for each buffer that a stack
// spans), `experts_activate` and `experts_combine` are what lies between and after.

// #import shared/batch
// #import shared/weight
// #import shared/product
// #import shared/input

struct Params {
    columns: u32,
    stride: u32,        // vectors a row of `weight`
    rows: u32,          // rows of one expert in this buffer
    first: u32,         // the output that the first of them makes
    width: u32,         // outputs of one expert
    first_expert: u32,  // the first local expert in this buffer
    experts: u32,       // experts in this buffer
    top_k: u32,
    by_token: u32,      // 1 where `input` has a row a token, 0 where it has one a place
    most_tiles: u32,    // tiles that `groups` has room for
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> input: array<f32>;          // [T or places, columns]
@group(0) @binding(3) var<storage, read> weight: array<vec4<u32>>;   // [experts, rows, stride]
@group(0) @binding(4) var<storage, read> groups: array<u32>;         // count, [most_tiles, 3]: expert, from, to; places
@group(0) @binding(5) var<storage, read_write> output: array<f32>;   // [places, width]

fn product(expert: u32) -> Product {
    return Product(params.columns, params.stride, (expert - params.first_expert) * params.rows * params.stride, params.rows);
}

// The place at `at` of the sorted list.
fn place(at: u32) -> u32 {
    return groups[1u + 3u * params.most_tiles + at];
}

// Where the row of `input` begins that a place reads.
fn source(place: u32) -> u32 {
    if (params.by_token == 1u) {
        return place / params.top_k * params.columns;
    }
    return place * params.columns;
}

fn put(place: u32, first: u32, values: vec4<f32>) {
    for (var i = 0u; i < 4u; i++) {
        if (first + i < params.rows) {
            output[place * params.width + params.first + first + i] = values[i];
        }
    }
}
