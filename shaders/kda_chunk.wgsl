// The gated delta rule in chunks of sixteen tokens, the chunkwise form of Kimi Linear (section 3.2), for prefill. Counterpart
// of `src/backend/cpu/kda_chunk.rs`.
//
// Two dispatches: `prepare` computes, for all chunks in parallel, everything that does not depend on the state; `scan`
// processes the chunks of a segment in order, with a workgroup per sixteen columns of one head's state, which is in workgroup
// memory.
//
// Gates have no lower bound, so `exp(G_i - G_j)` is never computed as `exp(G_i) exp(-G_j)`, which overflows. Each block of
// the two C x C matrices has an anchor between its rows and its columns instead (dyadic anchors): both factors are then
// exponentials of sums of gates, at most 1, and an underflow to 0 is the correct result.

// #import shared/batch
// #import shared/kda

@group(0) @binding(2) var<storage, read> qkv: array<f32>;             // [T, channels]
@group(0) @binding(3) var<storage, read> gates: array<f32>;           // [T, H K]
@group(0) @binding(4) var<storage, read> beta: array<f32>;            // [T, H]
@group(0) @binding(5) var<storage, read> prepared: array<f32>;        // [chunks, H, workspace()]
@group(0) @binding(6) var<storage, read_write> workspace_out: array<f32>;   // [chunks, H, workspace()]
@group(0) @binding(7) var<storage, read_write> states: array<f32>;    // [slots, H, K, V]
@group(0) @binding(8) var<storage, read_write> output: array<f32>;    // [T, H V]

// Tokens per chunk.
const C: u32 = 16u;
// Key channels per slice of `prepare`.
const SLICE: u32 = 16u;
// Columns of the state per workgroup of `scan`.
const COLUMNS: u32 = 16u;
// Maximum width of a key: `[KEY_WIDTH, COLUMNS]` f32 and the other arrays of `scan` fit in 16 KiB of workgroup memory.
override KEY_WIDTH: u32 = 128u;

// Elements that `prepare` writes for one chunk and head: K exp(G), Q exp(G) and Kr `[C, K]`, exp(G_C) `[K]`, A_kk and A_qk
// `[C, C]`.
fn workspace() -> u32 {
    return 3u * C * params.key_width + params.key_width + 2u * C * C;
}

fn workspace_at(chunk: u32, head: u32) -> u32 {
    return (chunk * params.heads + head) * workspace();
}

// Word `field` of a chunk.
fn chunk_word(chunk: u32, field: u32) -> u32 {
    return batch[batch[AT_CHUNKS] + CHUNK_WORDS * chunk + field];
}

var<workgroup> norms: array<f32, 32>;                 // [2, C]: the divisors of queries, then of keys
var<workgroup> halves: array<f32, 64>;
var<workgroup> query: array<f32, 256>;                // [C, SLICE], normalised and scaled
var<workgroup> key: array<f32, 256>;                  // [C, SLICE], normalised
var<workgroup> gate: array<f32, 256>;                 // [C, SLICE]
var<workgroup> key_decayed: array<f32, 1024>;         // [4 levels, C, SLICE]
var<workgroup> query_decayed: array<f32, 1024>;       // [4 levels, C, SLICE]

// Norms of the chunk's queries and keys: two threads per row.
fn measure(first: u32, length: u32, head: u32, thread: u32) {
    let k = params.key_width;
    let t = thread / 2u % C;
    let is_key = thread >= 32u;
    var sum = 0.0;
    if (t < length) {
        let at = query_at(first + t, head) + select(0u, params.key_heads * k, is_key);
        for (var d = thread % 2u; d < k; d += 2u) {
            let x = qkv[at + d];
            sum = fma(x, x, sum);
        }
    }
    halves[thread] = sum;
    workgroupBarrier();
    if (thread % 2u == 0u) {
        let norm = sqrt(halves[thread] + halves[thread + 1u] + L2_EPS);
        norms[thread / 2u] = norm * select(sqrt(f32(k)), 1.0, is_key);
    }
    workgroupBarrier();
}

// One workgroup of 64 per chunk (x) and head (y).
@compute @workgroup_size(64)
fn prepare(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let chunk = group.x;
    let head = group.y;
    let k = params.key_width;
    let first = chunk_word(chunk, CHUNK_ROW);
    let length = chunk_word(chunk, CHUNK_LENGTH);
    measure(first, length, head, thread);
    let base = workspace_at(chunk, head);

    // A thread's elements of the C x C matrices: column `thread % 16`, every fourth row.
    let j = thread % C;
    var a_kk = vec4<f32>(0.0);
    var a_qk = vec4<f32>(0.0);
    for (var slice = 0u; slice < k; slice += SLICE) {
        workgroupBarrier();
        for (var i = thread; i < C * SLICE; i += 64u) {
            let t = i / SLICE;
            let d = slice + i % SLICE;
            query[i] = 0.0;
            key[i] = 0.0;
            gate[i] = 0.0;
            if (t < length && d < k) {
                let at = query_at(first + t, head) + d;
                query[i] = qkv[at] / norms[t];
                key[i] = qkv[at + params.key_heads * k] / norms[C + t];
                gate[i] = gates[gates_at(first + t, head) + d];
            }
        }
        workgroupBarrier();
        decay_slice(thread);
        if (thread < SLICE && slice + thread < k) {
            leave(base, slice + thread, thread, length);
        }
        workgroupBarrier();
        for (var n = 0u; n < 4u; n++) {
            let i = thread / C + 4u * n;
            if (i == j) {
                for (var d = 0u; d < SLICE; d++) {
                    a_qk[n] = fma(query[i * SLICE + d], key[i * SLICE + d], a_qk[n]);
                }
            } else if (i > j) {
                // The level of the anchor between the two: the highest bit in which they differ.
                let level = firstLeadingBit(i ^ j);
                let row = (level * C + i) * SLICE;
                let column = (level * C + j) * SLICE;
                for (var d = 0u; d < SLICE; d++) {
                    let factor = key_decayed[column + d];
                    a_kk[n] = fma(key_decayed[row + d], factor, a_kk[n]);
                    a_qk[n] = fma(query_decayed[row + d], factor, a_qk[n]);
                }
            }
        }
    }
    let squares = base + (3u * C + 1u) * k;
    for (var n = 0u; n < 4u; n++) {
        let i = thread / C + 4u * n;
        var strength = 0.0;
        if (i < length) {
            strength = beta[(first + i) * params.heads + head];
        }
        workspace_out[squares + i * C + j] = strength * a_kk[n];
        workspace_out[squares + C * C + i * C + j] = a_qk[n];
    }
}

// Keys and queries of one slice, decayed to the anchors of each of the four levels; one thread per level and channel.
fn decay_slice(thread: u32) {
    let level = thread / SLICE;
    let d = thread % SLICE;
    let half = 1u << level;
    for (var anchor = half; anchor < C; anchor += 2u * half) {
        // Columns decay from the position after them up to the anchor, summed outwards from it.
        var sum = 0.0;
        for (var back = 1u; back <= half; back++) {
            let t = anchor - back;
            key_decayed[(level * C + t) * SLICE + d] = key[t * SLICE + d] * exp(sum);
            sum += gate[t * SLICE + d];
        }
        // Rows decay from the anchor to their own position, inclusive.
        sum = 0.0;
        for (var t = anchor; t < anchor + half; t++) {
            sum += gate[t * SLICE + d];
            let factor = exp(sum);
            key_decayed[(level * C + t) * SLICE + d] = key[t * SLICE + d] * factor;
            query_decayed[(level * C + t) * SLICE + d] = query[t * SLICE + d] * factor;
        }
    }
}

// Writes channel `d` of K exp(G), Q exp(G), Kr and exp(G_C); `at` is its index in the slice. After the chunk's last token
// keys, queries and gates are 0.
fn leave(base: u32, d: u32, at: u32, length: u32) {
    let k = params.key_width;
    var sum = 0.0;
    for (var t = 0u; t < C; t++) {
        sum += gate[t * SLICE + at];
        let factor = exp(sum);
        workspace_out[base + t * k + d] = key[t * SLICE + at] * factor;
        workspace_out[base + (C + t) * k + d] = query[t * SLICE + at] * factor;
    }
    // Summed backwards from the chunk's end: a difference of sums from the start would cancel under strong decay.
    sum = 0.0;
    for (var t = C; t > 0u; t--) {
        workspace_out[base + (2u * C + t - 1u) * k + d] = key[(t - 1u) * SLICE + at] * exp(sum);
        sum += gate[(t - 1u) * SLICE + at];
    }
    workspace_out[base + 3u * C * k + d] = exp(sum);
}

var<workgroup> state: array<f32, KEY_WIDTH * COLUMNS>;   // [K, COLUMNS]
var<workgroup> write: array<f32, 256>;                   // [C, COLUMNS]: U, the values that each token writes
var<workgroup> a: array<f32, 512>;                       // [2, C, C]: A_kk, A_qk

// One workgroup of 64 for COLUMNS columns (x) of a head (y) of a segment (z).
@compute @workgroup_size(64)
fn scan(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let segment = group.z;
    let head = group.y;
    if (!by_chunks(segment_word(segment, LENGTH))) {
        return;
    }
    let k = params.key_width;
    let v = params.value_width;
    let first_column = group.x * COLUMNS;
    load_state(segment_word(segment, SLOT_IN), head, first_column, thread);
    let chunks = segment_word(segment, CHUNKS);
    let count = segment_word(segment, CHUNK_COUNT);
    // A thread's tokens are i and i + 8, its columns c and c + 8.
    let c = thread % 8u;
    let i = thread / 8u;
    for (var n = 0u; n < count; n++) {
        let chunk = chunks + n;
        let first = chunk_word(chunk, CHUNK_ROW);
        let length = chunk_word(chunk, CHUNK_LENGTH);
        let base = workspace_at(chunk, head);
        for (var at = thread; at < 2u * C * C; at += 64u) {
            a[at] = prepared[base + (3u * C + 1u) * k + at];
        }
        workgroupBarrier();

        // (K exp(G)) S and (Q exp(G)) S: x and y are the two columns of token i, z and w those of token i + 8.
        var answer = vec4<f32>(0.0);
        var result = vec4<f32>(0.0);
        let keys = base + i * k;
        let queries = base + (C + i) * k;
        for (var d = 0u; d < k; d++) {
            let s = vec2<f32>(state[d * COLUMNS + c], state[d * COLUMNS + c + 8u]).xyxy;
            answer = fma(vec2<f32>(prepared[keys + d], prepared[keys + 8u * k + d]).xxyy, s, answer);
            result = fma(vec2<f32>(prepared[queries + d], prepared[queries + 8u * k + d]).xxyy, s, result);
        }
        write[i * COLUMNS + c] = answer.x;
        write[i * COLUMNS + c + 8u] = answer.y;
        write[(i + 8u) * COLUMNS + c] = answer.z;
        write[(i + 8u) * COLUMNS + c + 8u] = answer.w;
        workgroupBarrier();

        // U = (I + A_kk)^-1 [beta (V - (K exp(G)) S)], by forward substitution; one thread per column.
        if (thread < COLUMNS) {
            for (var t = 0u; t < C; t++) {
                var u = 0.0;
                if (t < length && first_column + thread < v) {
                    let value = qkv[value_at(first + t, head) + first_column + thread];
                    u = beta[(first + t) * params.heads + head] * (value - write[t * COLUMNS + thread]);
                }
                for (var before = 0u; before < t; before++) {
                    u = fma(-a[t * C + before], write[before * COLUMNS + thread], u);
                }
                write[t * COLUMNS + thread] = u;
            }
        }
        workgroupBarrier();

        // O = (Q exp(G)) S + A_qk U; above the diagonal A_qk is 0.
        for (var t = 0u; t <= i + 8u; t++) {
            let u = vec2<f32>(write[t * COLUMNS + c], write[t * COLUMNS + c + 8u]).xyxy;
            let factors = vec2<f32>(a[C * C + i * C + t], a[C * C + (i + 8u) * C + t]).xxyy;
            result = fma(factors, u, result);
        }
        put(first, length, head, i, first_column + c, result.xy);
        put(first, length, head, i + 8u, first_column + c, result.zw);

        // S' = diag(exp(G_C)) S + Kr^T U.
        for (var d = i; d < k; d += 8u) {
            let decay = prepared[base + 3u * C * k + d];
            var s = decay * vec2<f32>(state[d * COLUMNS + c], state[d * COLUMNS + c + 8u]);
            for (var t = 0u; t < C; t++) {
                let u = vec2<f32>(write[t * COLUMNS + c], write[t * COLUMNS + c + 8u]);
                s = fma(vec2<f32>(prepared[base + (2u * C + t) * k + d]), u, s);
            }
            state[d * COLUMNS + c] = s.x;
            state[d * COLUMNS + c + 8u] = s.y;
        }
        workgroupBarrier();
        let kept = chunk_word(chunk, CHUNK_SLOT);
        if (kept != NONE) {
            store_state(kept, head, first_column, thread);
        }
    }
    store_state(segment_word(segment, SLOT_OUT), head, first_column, thread);
}

// Two columns of one token's output, eight apart.
fn put(first: u32, length: u32, head: u32, t: u32, column: u32, values: vec2<f32>) {
    let v = params.value_width;
    let at = ((first + t) * params.heads + head) * v + column;
    if (t < length && column < v) {
        output[at] = values.x;
    }
    if (t < length && column + 8u < v) {
        output[at + 8u] = values.y;
    }
}

fn load_state(slot: u32, head: u32, first_column: u32, thread: u32) {
    let v = params.value_width;
    for (var i = thread; i < params.key_width * COLUMNS; i += 64u) {
        let column = first_column + i % COLUMNS;
        state[i] = 0.0;
        if (slot != NONE && column < v) {
            state[i] = states[state_at(slot, head) + i / COLUMNS * v + column];
        }
    }
    workgroupBarrier();
}

fn store_state(slot: u32, head: u32, first_column: u32, thread: u32) {
    let v = params.value_width;
    for (var i = thread; i < params.key_width * COLUMNS; i += 64u) {
        let column = first_column + i % COLUMNS;
        if (column < v) {
            states[state_at(slot, head) + i / COLUMNS * v + column] = state[i];
        }
    }
}
