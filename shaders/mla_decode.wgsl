// Latent attention for few queries: the expansion is absorbed into query and output, so that cached rows are not expanded.
// Counterpart of `src/backend/cpu/mla_decode.rs`.
//
// Four dispatches: `absorb` computes the absorbed query, `attend` runs a softmax over a span of positions, `combine` merges
// the spans of a row, `expand` expands the weighted latent to a value. Spans are counted from the sequence's start, so a
// row's arithmetic depends on its position alone. If kv_b is in several buffers, the first and the last dispatch run once for
// each.

// #import shared/batch
// #import shared/mla
// #import shared/weight
// #import shared/sums

@group(0) @binding(2) var<storage, read> query: array<f32>;               // [T, H (nope + rope)]
@group(0) @binding(3) var<storage, read> weight: array<vec4<u32>>;        // kv_b: [rows, stride]
@group(0) @binding(4) var<storage, read_write> absorbed_out: array<f32>;  // [n, H, latent]: queries, then contexts
@group(0) @binding(5) var<storage, read> absorbed: array<f32>;            // [n, H, latent]
@group(0) @binding(6) var<storage, read> latents: array<u32>;             // [blocks, block_tokens, latent + rope]
@group(0) @binding(7) var<storage, read_write> parts_out: array<f32>;     // [spans, H, latent + 2]: weighted sum, greatest score, sum of exponentials
@group(0) @binding(8) var<storage, read> parts: array<f32>;               // [spans, H, latent + 2]
@group(0) @binding(9) var<storage, read_write> output: array<f32>;        // [T, H value]


// Maximum width of a cached row.
const WIDTH: u32 = 1024u;

// Positions whose scores are computed together.
const RUN: u32 = 64u;

// Positions per span of single tokens; all other rows have one span each.
override SPAN: u32 = 512u;

// The row of the batch that has index `n` among those of this dispatch.
fn row_of(n: u32) -> u32 {
    return batch[batch[AT_ROWS] + params.begin * batch[SEVERAL_ROWS] + n];
}

// q_lat = W_UK^T q_nope: one thread per element (x) of a head (y) of a row (z).
@compute @workgroup_size(64)
fn absorb(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let l = group.x * 64u + thread;
    let head = group.y;
    if (l >= params.latent) {
        return;
    }
    let at = (group.z * params.heads + head) * params.latent + l;
    let first_query = row_of(group.z) * params.heads * key_width() + head * key_width();
    let first = head * (params.nope + params.value);
    // Other dispatches add the rows of other buffers, in their order.
    var sum = 0.0;
    if (first < params.first_row) {
        sum = absorbed_out[at];
    }
    for (var n = 0u; n < params.nope; n++) {
        let row = first + n - params.first_row;
        if (row < params.rows) {
            sum = fma(query[first_query + n], element(row * params.stride, l), sum);
        }
    }
    absorbed_out[at] = sum;
}

var<workgroup> latent_query: array<f32, WIDTH>;   // [latent + rope]
var<workgroup> mixed: array<f32, WIDTH>;          // [latent]: the weighted latent so far
var<workgroup> chances: array<f32, RUN>;          // exp(score - greatest) of a run
var<workgroup> offsets: array<u32, RUN>;           // the offset of each row of a run

// Softmax over the positions of a span, a run at a time: one workgroup per head (y) of a span (x).
@compute @workgroup_size(64)
fn attend(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    var number = group.x;
    var start = 0u;
    if (params.begin == 1u) {
        number = batch[batch[AT_SPANS] + SPAN_WORDS * group.x + SPAN_ROW];
        start = batch[batch[AT_SPANS] + SPAN_WORDS * group.x + SPAN_FIRST];
    }
    let row = row_of(number);
    let head = group.y;
    let segment = owner(row);
    var positions = segment_word(segment, POSITION) + row - segment_word(segment, START) + 1u;
    if (params.begin == 1u) {
        positions = min(positions, start + SPAN);
    }
    let width = params.latent + params.rope;
    let first = (number * params.heads + head) * params.latent;
    let first_rope = (row * params.heads + head) * key_width() + params.nope;
    for (var i = thread; i < width; i += 64u) {
        if (i < params.latent) {
            latent_query[i] = absorbed[first + i];
            mixed[i] = 0.0;
        } else {
            latent_query[i] = query[first_rope + i - params.latent];
        }
    }
    var greatest = LOWEST;
    var total = 0.0;
    for (var begin = start; begin < positions; begin += RUN) {
        workgroupBarrier();
        var score = LOWEST;
        let position = begin + thread;
        if (position < positions) {
            let at = latent_at(segment, position);
            offsets[thread] = at;
            var sum = vec4<f32>(0.0);
            var i = 0u;
            for (; i + 4u <= width; i += 4u) {
                let key = latent_four(at, i);
                let mine = vec4<f32>(latent_query[i], latent_query[i + 1u], latent_query[i + 2u], latent_query[i + 3u]);
                sum = fma(key, mine, sum);
            }
            for (; i < width; i++) {
                sum.x = fma(latent_element(at, i), latent_query[i], sum.x);
            }
            score = ((sum.x + sum.z) + (sum.y + sum.w)) * score_scale();
        }
        let best = max(greatest, max_all(score, thread));
        let keep = exp(greatest - best);
        greatest = best;
        var chance = 0.0;
        if (position < positions) {
            chance = exp(score - best);
        }
        chances[thread] = chance;
        total = total * keep + sum_all(chance, thread);
        let count = min(RUN, positions - begin);
        for (var i = thread; i < params.latent; i += 64u) {
            var sum = mixed[i] * keep;
            for (var n = 0u; n < count; n++) {
                sum = fma(chances[n], latent_element(offsets[n], i), sum);
            }
            mixed[i] = sum;
        }
    }
    let part = part_at(group.x, head);
    for (var i = thread; i < params.latent; i += 64u) {
        parts_out[part + i] = mixed[i];
    }
    if (thread == 0u) {
        parts_out[part + params.latent] = greatest;
        parts_out[part + params.latent + 1u] = total;
    }
}

// The offset of a span's part.
fn part_at(span: u32, head: u32) -> u32 {
    return (span * params.heads + head) * (params.latent + 2u);
}

// The weighted latent of a row from its spans, in their order; it overwrites the absorbed query. One thread per element (x)
// of a head (y) of a row (z).
@compute @workgroup_size(64)
fn combine(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let l = group.x * 64u + thread;
    let head = group.y;
    if (l >= params.latent) {
        return;
    }
    var span = group.z;
    var count = 1u;
    if (params.begin == 1u) {
        span = batch[batch[AT_SPANNED] + SPANNED_WORDS * group.z + SPANNED_FIRST];
        count = batch[batch[AT_SPANNED] + SPANNED_WORDS * group.z + SPANNED_COUNT];
    }
    var greatest = LOWEST;
    for (var n = 0u; n < count; n++) {
        greatest = max(greatest, parts[part_at(span + n, head) + params.latent]);
    }
    var sum = 0.0;
    var total = 0.0;
    for (var n = 0u; n < count; n++) {
        let part = part_at(span + n, head);
        let weight = exp(parts[part + params.latent] - greatest);
        sum = fma(parts[part + l], weight, sum);
        total = fma(parts[part + params.latent + 1u], weight, total);
    }
    absorbed_out[(group.z * params.heads + head) * params.latent + l] = sum / total;
}

// W_UV times the weighted latent: eight threads per element of the output (x), of a head (y) of a row (z).
@compute @workgroup_size(64)
fn expand(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let e = group.x * 8u + thread / 8u;
    let head = group.y;
    let row = head * (params.nope + params.value) + params.nope + e - params.first_row;
    let inside = e < params.value && row < params.rows;
    let first = (group.z * params.heads + head) * params.latent;
    var sum = 0.0;
    if (inside) {
        for (var l = thread % 8u; l < params.latent; l += 8u) {
            sum = fma(absorbed[first + l], element(row * params.stride, l), sum);
        }
    }
    sum = sum_eight(vec4<f32>(sum), thread).x;
    if (inside && thread % 8u == 0u) {
        output[(row_of(group.z) * params.heads + head) * params.value + e] = sum;
    }
}
