// What one head attends to: its weight of every position. Twin of `trace_attention` in `src/backend/cpu/trace.rs`.
//
// Three dispatches: `absorb_head` makes the query of the latents (once for each buffer of kv_b), `score` takes it against
// every cached row, `normalise` makes a softmax of the scores. Rows of pieces that are not single tokens are zero, and so
// are places past the token's own.

// #import shared/batch
// #import shared/mla
// #import shared/weight
// #import shared/sums

@group(0) @binding(2) var<storage, read> query: array<f32>;               // [T, H (nope + rope)]
@group(0) @binding(3) var<storage, read> weight: array<vec4<u32>>;        // kv_b: [rows, stride]
@group(0) @binding(4) var<storage, read_write> absorbed_out: array<f32>;  // [T, latent]
@group(0) @binding(5) var<storage, read> absorbed: array<f32>;            // the same
@group(0) @binding(6) var<storage, read> latents: array<f32>;             // [blocks, block_tokens, latent + rope]
@group(0) @binding(7) var<storage, read_write> output: array<f32>;        // [T, places]: scores, then weights

// The first element of the head's query in row `row`.
fn head_query(row: u32) -> u32 {
    return (row * params.heads + params.head) * key_width();
}

// How many places of row `row` are filled.
fn filled(row: u32) -> u32 {
    let piece = owner(row);
    if (piece_word(piece, LENGTH) != 1u) {
        return 0u;
    }
    return min(piece_word(piece, POSITION) + 1u, params.places);
}

// q_lat = W_UK^T q_nope: a thread an element (x) of a row (y).
@compute @workgroup_size(64)
fn absorb_head(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let l = group.x * 64u + thread;
    if (l >= params.latent) {
        return;
    }
    let at = group.y * params.latent + l;
    let first = params.head * (params.nope + params.value);
    // Rows of other buffers were added before or will be, in their order.
    var sum = 0.0;
    if (first < params.first_row) {
        sum = absorbed_out[at];
    }
    for (var n = 0u; n < params.nope; n++) {
        let row = first + n - params.first_row;
        if (row < params.rows) {
            sum = fma(query[head_query(group.y) + n], element(row * params.stride, l), sum);
        }
    }
    absorbed_out[at] = sum;
}

// A thread a position (x) of a row (y).
@compute @workgroup_size(64)
fn score(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let position = group.x * 64u + thread;
    let row = group.y;
    if (position >= filled(row)) {
        return;
    }
    let at = latent_at(owner(row), position);
    let mine = row * params.latent;
    var sum = vec4<f32>(0.0);
    for (var i = 0u; i < params.latent; i++) {
        sum[i % 4u] = fma(latents[at + i], absorbed[mine + i], sum[i % 4u]);
    }
    for (var i = 0u; i < params.rope; i++) {
        let shared_key = latents[at + params.latent + i];
        sum[i % 4u] = fma(shared_key, query[head_query(row) + params.nope + i], sum[i % 4u]);
    }
    output[row * params.places + position] = ((sum.x + sum.z) + (sum.y + sum.w)) * score_scale();
}

// A workgroup a row (x).
@compute @workgroup_size(64)
fn normalise(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let positions = filled(group.x);
    let first = group.x * params.places;
    var greatest = LOWEST;
    for (var i = thread; i < positions; i += 64u) {
        greatest = max(greatest, output[first + i]);
    }
    greatest = max_all(greatest, thread);
    var total = 0.0;
    for (var i = thread; i < positions; i += 64u) {
        total += exp(output[first + i] - greatest);
    }
    total = sum_all(total, thread);
    for (var i = thread; i < params.places; i += 64u) {
        var chance = 0.0;
        if (i < positions) {
            chance = exp(output[first + i] - greatest) / total;
        }
        output[first + i] = chance;
    }
}
