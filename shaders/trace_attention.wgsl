// The attention weights of one head, for every position. Counterpart of `trace_attention` in `src/backend/cpu/trace.rs`.
//
// Three dispatches: `absorb_head` computes the absorbed query (once for each buffer of kv_b), `score` multiplies it with
// every cached row, `normalise` computes a softmax of the scores. Rows of segments that are not single tokens are zero, and
// so are positions after the token's own; those in spans that no row reaches are left undefined.

// #import shared/batch
// #import shared/mla
// #import shared/weight
// #import shared/sums

@group(0) @binding(2) var<storage, read> query: array<f32>;               // [T, H (nope + rope)]
@group(0) @binding(3) var<storage, read> weight: array<vec4<u32>>;        // kv_b: [rows, stride]
@group(0) @binding(4) var<storage, read_write> absorbed_out: array<f32>;  // [T, latent]
@group(0) @binding(5) var<storage, read> absorbed: array<f32>;            // [T, latent]
@group(0) @binding(6) var<storage, read> latents: array<u32>;             // [blocks, block_tokens, latent + rope]
@group(0) @binding(7) var<storage, read_write> output: array<f32>;        // [T, positions]: scores, then weights
@group(0) @binding(8) var<storage, read_write> spans: array<vec2<f32>>;   // [T, spans]: the greatest score, and the sum

// The first element of the head's query in row `row`.
fn head_query(row: u32) -> u32 {
    return (row * params.heads + params.head) * key_width();
}

// Number of positions of row `row` with a weight.
fn filled(row: u32) -> u32 {
    let segment = owner(row);
    if (segment_word(segment, LENGTH) != 1u) {
        return 0u;
    }
    return min(segment_word(segment, POSITION) + 1u, params.positions);
}

// Spans per row.
fn span_count() -> u32 {
    return (params.positions + SPAN - 1u) / SPAN;
}

// q_lat = W_UK^T q_nope: one thread per element (x) of a row (y).
@compute @workgroup_size(64)
fn absorb_head(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let l = group.x * 64u + thread;
    if (l >= params.latent) {
        return;
    }
    let at = group.y * params.latent + l;
    let first = params.head * (params.nope + params.value);
    // Other dispatches add the rows of other buffers, in their order.
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

// Positions per workgroup, and threads per position.
const SPAN: u32 = 128u;
const LANES: u32 = 16u;
// Positions that the 64 threads process at a time.
const TOGETHER: u32 = 4u;

var<workgroup> scores: array<array<f32, LANES>, SPAN>;

// The scores of a span (x) of a row (y), with their maximum and the sum of their exponentials.
@compute @workgroup_size(64)
fn score(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = group.y;
    let segment = owner(row);
    let first = group.x * SPAN;
    let positions = filled(row);
    let lane = thread % LANES;
    for (var i = thread / LANES; i < SPAN; i += TOGETHER) {
        var sum = 0.0;
        if (first + i < positions) {
            // Adjacent threads read adjacent elements.
            let at = latent_at(segment, first + i);
            let mine = row * params.latent;
            for (var l = lane; l < params.latent; l += LANES) {
                sum = fma(latent_element(at, l), absorbed[mine + l], sum);
            }
            let shared_query = head_query(row) + params.nope;
            for (var r = lane; r < params.rope; r += LANES) {
                sum = fma(latent_element(at, params.latent + r), query[shared_query + r], sum);
            }
        }
        scores[i][lane] = sum;
    }
    workgroupBarrier();
    var greatest = LOWEST;
    var mine = array<f32, SPAN / 64u>();
    for (var j = 0u; j < SPAN / 64u; j++) {
        let i = thread + 64u * j;
        mine[j] = LOWEST;
        if (first + i < positions) {
            var sum = 0.0;
            for (var l = 0u; l < LANES; l++) {
                sum += scores[i][l];
            }
            mine[j] = sum * score_scale();
            output[row * params.positions + first + i] = mine[j];
        }
        greatest = max(greatest, mine[j]);
    }
    greatest = max_all(greatest, thread);
    var total = 0.0;
    for (var j = 0u; j < SPAN / 64u; j++) {
        if (first + thread + 64u * j < positions) {
            total += exp(mine[j] - greatest);
        }
    }
    total = sum_all(total, thread);
    if (thread == 0u) {
        spans[row * span_count() + group.x] = vec2<f32>(greatest, total);
    }
}

// A span (x) of a row (y): converts its scores to weights, with the maximum and sum over all spans of the row.
@compute @workgroup_size(64)
fn normalise(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = group.y;
    let positions = filled(row);
    let count = (positions + SPAN - 1u) / SPAN;
    var greatest = LOWEST;
    for (var i = thread; i < count; i += 64u) {
        greatest = max(greatest, spans[row * span_count() + i].x);
    }
    greatest = max_all(greatest, thread);
    var total = 0.0;
    for (var i = thread; i < count; i += 64u) {
        let span = spans[row * span_count() + i];
        total = fma(span.y, exp(span.x - greatest), total);
    }
    total = sum_all(total, thread);
    let end = min((group.x + 1u) * SPAN, params.positions);
    for (var i = group.x * SPAN + thread; i < end; i += 64u) {
        var chance = 0.0;
        if (i < positions) {
            chance = exp(output[row * params.positions + i] - greatest) / total;
        }
        output[row * params.positions + i] = chance;
    }
}
