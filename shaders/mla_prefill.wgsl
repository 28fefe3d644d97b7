// Latent attention for many queries over keys and values expanded from the latents, a window of positions at a time.
// Counterpart of `src/backend/cpu/mla_prefill.rs`.
//
// Softmax runs online (Milakov and Gimelshein, arXiv 1805.02867) over runs of 64 positions counted from the sequence's start,
// so a row's arithmetic depends on its position alone, not on how the prompt was cut. Between windows a row's unfinished
// output is in `output`, its greatest score and sum in `softmax`. The expansion is `mla_expand`.

// #import shared/batch
// #import shared/mla

@group(0) @binding(2) var<storage, read> query: array<f32>;            // [T, H (nope + rope)]
@group(0) @binding(3) var<storage, read> expanded: array<f32>;         // [window, H (nope + value)]
@group(0) @binding(4) var<storage, read> latents: array<u32>;          // [blocks, block_tokens, latent + rope]
@group(0) @binding(5) var<storage, read_write> softmax: array<f32>;    // [T, H, 2]
@group(0) @binding(6) var<storage, read_write> output: array<f32>;     // [T, H value]

// Queries per tile, positions per run.
const QUERIES: u32 = 16u;
const RUN: u32 = 64u;

var<workgroup> scores: array<f32, 1024>;     // [QUERIES, RUN]
var<workgroup> offsets: array<u32, RUN>;      // the offset of each row of a run
var<workgroup> marks: array<vec4<f32>, 64>;  // [QUERIES, 4]: greatest score so far, sum, factor of the earlier output
var<workgroup> parts: array<f32, 64>;        // [QUERIES, 4]

fn expanded_at(n: u32, head: u32) -> u32 {
    return (n * params.heads + head) * (params.nope + params.value);
}

// Four queries by four positions of scores; queries are `q + 4 i`, positions `p + 16 j` of the run.
fn score_tile(first_query: u32, head: u32, q: u32, rows: u32, in_window: u32, p: u32, count: u32) {
    let row_width = params.heads * key_width();
    var s = array<vec4<f32>, 4>(vec4<f32>(0.0), vec4<f32>(0.0), vec4<f32>(0.0), vec4<f32>(0.0));
    // Positions past the end repeat the last one; their scores are not used.
    var begin = vec4<u32>(0u);
    var to = vec4<u32>(0u);
    var shared_to = vec4<u32>(0u);
    for (var i = 0u; i < 4u; i++) {
        begin[i] = (first_query + min(q + 4u * i, rows - 1u)) * row_width + head * key_width();
        let n = min(p + 16u * i, count - 1u);
        to[i] = expanded_at(in_window + n, head);
        shared_to[i] = offsets[n];
    }
    for (var d = 0u; d < params.nope; d++) {
        let k = vec4<f32>(expanded[to.x + d], expanded[to.y + d], expanded[to.z + d], expanded[to.w + d]);
        s[0] = fma(vec4<f32>(query[begin.x + d]), k, s[0]);
        s[1] = fma(vec4<f32>(query[begin.y + d]), k, s[1]);
        s[2] = fma(vec4<f32>(query[begin.z + d]), k, s[2]);
        s[3] = fma(vec4<f32>(query[begin.w + d]), k, s[3]);
    }
    begin += vec4<u32>(params.nope);
    for (var d = 0u; d < params.rope; d++) {
        let i = params.latent + d;
        let k = vec4<f32>(
            latent_element(shared_to.x, i),
            latent_element(shared_to.y, i),
            latent_element(shared_to.z, i),
            latent_element(shared_to.w, i),
        );
        s[0] = fma(vec4<f32>(query[begin.x + d]), k, s[0]);
        s[1] = fma(vec4<f32>(query[begin.y + d]), k, s[1]);
        s[2] = fma(vec4<f32>(query[begin.z + d]), k, s[2]);
        s[3] = fma(vec4<f32>(query[begin.w + d]), k, s[3]);
    }
    for (var i = 0u; i < 4u; i++) {
        for (var j = 0u; j < 4u; j++) {
            scores[(q + 4u * i) * RUN + p + 16u * j] = s[i][j] * score_scale();
        }
    }
}

// One window for one tile (x) of queries of a head (y). `params.begin` is the window's index.
@compute @workgroup_size(64)
fn mla_prefill(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let window = batch[AT_WINDOWS] + WINDOW_WORDS * params.begin;
    let segment = batch[window + WINDOW_SEGMENT];
    let first = batch[window + WINDOW_FIRST];
    let window_end = first + batch[window + WINDOW_POSITIONS];
    let tile = batch[AT_TILES] + TILE_WORDS * (batch[window + WINDOW_TILE] + group.x);
    let head = group.y;
    let position = segment_word(segment, POSITION) + batch[tile + TILE_FIRST];  // of the tile's first query
    let first_query = segment_word(segment, START) + batch[tile + TILE_FIRST];
    let rows = min(QUERIES, segment_word(segment, LENGTH) - batch[tile + TILE_FIRST]);
    let end = min(window_end, position + rows);  // the end of the positions that the tile attends to
    if (first >= end) {
        return;
    }
    let value = params.value;
    // Four threads share a query where rows are summed.
    let mine = thread / 4u;
    let part = thread % 4u;
    let mark_at = ((first_query + mine) * params.heads + head) * 2u;
    var greatest = LOWEST;
    var total = 0.0;
    if (first > 0u && mine < rows) {
        greatest = softmax[mark_at];
        total = softmax[mark_at + 1u];
    }
    for (var begin = first; begin < end; begin += RUN) {
        let count = min(RUN, end - begin);
        workgroupBarrier();
        if (thread < count) {
            offsets[thread] = latent_at(segment, begin + thread);
        }
        workgroupBarrier();
        score_tile(first_query, head, thread / 16u, rows, begin - first, thread % 16u, count);
        workgroupBarrier();

        // Causal: query `mine` attends to the run's first `seen` positions.
        var seen = 0u;
        if (mine < rows && position + mine + 1u > begin) {
            seen = min(count, position + mine + 1u - begin);
        }
        var best = LOWEST;
        for (var n = part; n < seen; n += 4u) {
            best = max(best, scores[mine * RUN + n]);
        }
        parts[thread] = best;
        workgroupBarrier();
        let quarter = 4u * mine;
        best = max(greatest, max(max(parts[quarter], parts[quarter + 1u]), max(parts[quarter + 2u], parts[quarter + 3u])));
        workgroupBarrier();
        var sum = 0.0;
        for (var n = part; n < RUN; n += 4u) {
            var chance = 0.0;
            if (n < seen) {
                chance = exp(scores[mine * RUN + n] - best);
            }
            scores[mine * RUN + n] = chance;
            sum += chance;
        }
        parts[thread] = sum;
        workgroupBarrier();
        let keep = exp(greatest - best);
        sum = (parts[quarter] + parts[quarter + 2u]) + (parts[quarter + 1u] + parts[quarter + 3u]);
        total = total * keep + sum;
        greatest = best;
        if (part == 0u) {
            marks[mine] = vec4<f32>(greatest, total, keep, 0.0);
        }
        workgroupBarrier();

        // Four queries by one column of the values per thread and iteration.
        let row_width = params.heads * value;
        for (var at = thread; at < 4u * value; at += 64u) {
            let e = at % value;
            let q = 4u * (at / value);
            var sums = vec4<f32>(0.0);
            if (begin > 0u) {
                for (var i = 0u; i < 4u; i++) {
                    if (q + i < rows) {
                        sums[i] = output[(first_query + q + i) * row_width + head * value + e] * marks[q + i].z;
                    }
                }
            }
            for (var n = 0u; n < count; n++) {
                let x = expanded[expanded_at(begin - first + n, head) + params.nope + e];
                let chance = vec4<f32>(
                    scores[q * RUN + n],
                    scores[(q + 1u) * RUN + n],
                    scores[(q + 2u) * RUN + n],
                    scores[(q + 3u) * RUN + n],
                );
                sums = fma(chance, vec4<f32>(x), sums);
            }
            for (var i = 0u; i < 4u; i++) {
                if (q + i < rows) {
                    // A row is complete when it has attended to its own position: then its output is divided by the sum.
                    let own = position + q + i;
                    let divisor = select(1.0, marks[q + i].y, own >= begin && own < begin + RUN);
                    if (own >= begin) {
                        output[(first_query + q + i) * row_width + head * value + e] = sums[i] / divisor;
                    }
                }
            }
        }
    }
    if (part == 0u && mine < rows) {
        softmax[mark_at] = greatest;
        softmax[mark_at + 1u] = total;
    }
}
