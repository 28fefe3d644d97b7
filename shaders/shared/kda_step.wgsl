// The gated delta rule one token at a time: the definition. Counterpart of `src/backend/cpu/kda_step.rs`.
//
// A workgroup processes eight columns of one head's state in one segment; eight threads share a column, each every eighth key
// channel, and no other thread accesses those elements. The state stays in the pool: no thread keeps a column. The including
// shader has the functions `log_decay` and `write_strength`.

// #import shared/batch
// #import shared/sums
// #import shared/kda

@group(0) @binding(2) var<storage, read> qkv: array<f32>;             // [T, channels]
@group(0) @binding(5) var<storage, read_write> states: array<f32>;    // [slots, H, K, V]
@group(0) @binding(6) var<storage, read_write> output: array<f32>;    // [T, H V]

// Columns per workgroup.
const COLUMNS: u32 = 8u;
override KEY_WIDTH: u32 = 128u;

var<workgroup> strength: f32;
var<workgroup> decays: array<f32, KEY_WIDTH>;
var<workgroup> keys: array<f32, KEY_WIDTH>;       // of length 1
var<workgroup> queries: array<f32, KEY_WIDTH>;    // of length K^-1/2

// Puts a token's write strength, decays, key and query where all columns read them. Barriers separate the gates from what is
// computed with them: so they are rounded as those of `kda_gates` are, and a step that is traced has the same bits.
fn gather(row: u32, head: u32, thread: u32) {
    let k = params.key_width;
    let query = query_at(row, head);
    let key = query + params.key_heads * k;
    var squares = vec2<f32>(0.0);
    // Every thread has read the token before.
    workgroupBarrier();
    if (thread == 0u) {
        strength = write_strength(row, head);
    }
    for (var d = thread; d < k; d += 64u) {
        decays[d] = log_decay(row, head, d);
        let qk = vec2<f32>(qkv[query + d], qkv[key + d]);
        squares = fma(qk, qk, squares);
    }
    let query_norm = sqrt(sum_all(squares.x, thread) + L2_EPS) * sqrt(f32(k));
    let key_norm = sqrt(sum_all(squares.y, thread) + L2_EPS);
    for (var d = thread; d < k; d += 64u) {
        decays[d] = exp(decays[d]);
        keys[d] = qkv[key + d] / key_norm;
        queries[d] = qkv[query + d] / query_norm;
    }
    workgroupBarrier();
}

fn step_segment(group: vec3<u32>, thread: u32) {
    let segment = group.z;
    let head = group.y;
    let length = segment_word(segment, LENGTH);
    if (by_chunks(length)) {
        return;
    }
    let k = params.key_width;
    let v = params.value_width;
    // The lanes of a column are adjacent, so that their sum is over eight adjacent threads.
    let lane = thread % 8u;
    let column = group.x * COLUMNS + thread / 8u;
    let inside = column < v;
    let slot_out = segment_word(segment, SLOT_OUT);
    let start = segment_word(segment, START);
    let checkpoints = segment_word(segment, CHECKPOINTS);
    let checkpoint_count = segment_word(segment, CHECKPOINT_COUNT);
    var slot = segment_word(segment, SLOT_IN);
    var next = 0u;
    if (length == 0u && inside) {
        for (var d = lane; d < k; d += 8u) {
            var value = 0.0;
            if (slot != NONE) {
                value = states[state_at(slot, head) + d * v + column];
            }
            states[state_at(slot_out, head) + d * v + column] = value;
        }
    }
    for (var t = 0u; t < length; t++) {
        let row = start + t;
        gather(row, head, thread);

        // The state decays, then is multiplied with the key: its prediction of the value.
        var answer = 0.0;
        if (inside) {
            for (var d = lane; d < k; d += 8u) {
                if (slot != NONE) {
                    let decayed = decays[d] * states[state_at(slot, head) + d * v + column];
                    answer = fma(keys[d], decayed, answer);
                }
            }
        }
        answer = sum_eight(vec4<f32>(answer), thread).x;

        // The prediction's error, times beta, is written.
        var result = 0.0;
        if (inside) {
            let write = strength * (qkv[value_at(row, head) + column] - answer);
            for (var d = lane; d < k; d += 8u) {
                var decayed = 0.0;
                if (slot != NONE) {
                    decayed = decays[d] * states[state_at(slot, head) + d * v + column];
                }
                let value = fma(keys[d], write, decayed);
                states[state_at(slot_out, head) + d * v + column] = value;
                result = fma(queries[d], value, result);
            }
        }
        result = sum_eight(vec4<f32>(result), thread).x;
        if (inside && lane == 0u) {
            output[(row * params.heads + head) * v + column] = result;
        }
        slot = slot_out;
        if (next < checkpoint_count && batch[checkpoints + CHECKPOINT_WORDS * next + CHECKPOINT_AFTER] == t + 1u) {
            let kept = batch[checkpoints + CHECKPOINT_WORDS * next + CHECKPOINT_SLOT];
            if (inside) {
                for (var d = lane; d < k; d += 8u) {
                    states[state_at(kept, head) + d * v + column] = states[state_at(slot_out, head) + d * v + column];
                }
            }
            next += 1u;
        }
    }
}
