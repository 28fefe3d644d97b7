// The routed experts: assignments (a token and one of its choices) are grouped by expert, each group is multiplied with its
// expert's matrices, and the results of a token's choices are summed in their order. Counterpart of
// `src/backend/cpu/experts.rs`.
//
// `experts_group` sorts, `experts_few` or `experts_many` multiply (gate, up, down, once for each buffer of a stack),
// `experts_activate` computes the activation between them, and `experts_combine` the sums after them.

// #import shared/batch
// #import shared/weight
// #import shared/product
// #import shared/input

struct Params {
    columns: u32,
    stride: u32,        // vectors per row of `weight`
    rows: u32,          // rows of one expert in this buffer
    first: u32,         // the output of the first of these rows
    width: u32,         // outputs of one expert
    first_expert: u32,  // the first local expert in this buffer
    experts: u32,       // experts in this buffer
    top_k: u32,
    by_token: u32,      // 1 if `input` has a row per token, 0 if it has one per assignment
    most_tiles: u32,    // maximum number of tiles in `groups`
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> input: array<f32>;          // [T or assignments, columns]
@group(0) @binding(3) var<storage, read> weight: array<vec4<u32>>;   // [experts, rows, stride]
@group(0) @binding(4) var<storage, read> groups: array<u32>;         // count, [most_tiles, 3]: expert, from, to; assignments
@group(0) @binding(5) var<storage, read_write> output: array<f32>;   // [assignments, width]

fn product(expert: u32) -> Product {
    return Product(params.columns, params.stride, (expert - params.first_expert) * params.rows * params.stride, params.rows);
}

// The assignment at index `at` of the sorted list.
fn assignment(at: u32) -> u32 {
    return groups[1u + 3u * params.most_tiles + at];
}

// The start of the row of `input` that an assignment reads.
fn source(assignment: u32) -> u32 {
    if (params.by_token == 1u) {
        return assignment / params.top_k * params.columns;
    }
    return assignment * params.columns;
}

fn put(assignment: u32, first: u32, values: vec4<f32>) {
    for (var i = 0u; i < 4u; i++) {
        if (first + i < params.rows) {
            output[assignment * params.width + params.first + first + i] = values[i];
        }
    }
}
