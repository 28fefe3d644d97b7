// Statistics of what a KDA layer will write to its states. Counterpart of `trace_kda` in `src/backend/cpu/trace.rs`.
//
// Runs before the recurrence and reads the state that it will update. Rows of segments that are not single tokens are zero.
// The arithmetic is that of `kda_step`, with one thread per column.

// #import shared/batch
// #import shared/sums
// #import shared/kda

@group(0) @binding(2) var<storage, read> qkv: array<f32>;             // [T, channels]
@group(0) @binding(3) var<storage, read> gates: array<f32>;           // [T, H K]
@group(0) @binding(4) var<storage, read> beta: array<f32>;            // [T, H]
@group(0) @binding(5) var<storage, read> states: array<f32>;          // [slots, H, K, V]
@group(0) @binding(6) var<storage, read_write> output: array<f32>;    // [T, layers, H, NUMBERS + K]

// Numbers at the start of a record: the norms of the state after the token, of the write and of the error, the mean decay,
// the write strength. They are followed by the log decays.
const NUMBERS: u32 = 5u;
override KEY_WIDTH: u32 = 128u;

var<workgroup> keys: array<f32, KEY_WIDTH>;    // of length 1
var<workgroup> decays: array<f32, KEY_WIDTH>;

// One workgroup per token (x) and head (y).
@compute @workgroup_size(64)
fn trace_kda(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = group.x;
    let head = group.y;
    let segment = owner(row);
    let record = NUMBERS + params.key_width;
    let at = ((row * params.layers + params.layer) * params.heads + head) * record;
    if (segment_word(segment, LENGTH) != 1u) {
        for (var i = thread; i < record; i += 64u) {
            output[at + i] = 0.0;
        }
        return;
    }
    let k = params.key_width;
    let v = params.value_width;
    let slot = segment_word(segment, SLOT_IN);
    let key = query_at(row, head) + params.key_heads * k;
    let strength = beta[row * params.heads + head];
    var squares = 0.0;
    var kept = 0.0;
    for (var d = thread; d < k; d += 64u) {
        let gate = gates[gates_at(row, head) + d];
        output[at + NUMBERS + d] = gate;
        decays[d] = exp(gate);
        squares = fma(qkv[key + d], qkv[key + d], squares);
        kept += decays[d];
    }
    squares = sum_all(squares, thread);
    kept = sum_all(kept, thread);
    let norm = sqrt(squares + L2_EPS);
    for (var d = thread; d < k; d += 64u) {
        keys[d] = qkv[key + d] / norm;
    }
    workgroupBarrier();

    var wrong = 0.0;
    var after = 0.0;
    for (var column = thread; column < v; column += 64u) {
        var error = qkv[value_at(row, head) + column];
        let first = state_at(slot, head) + column;
        if (slot != NONE) {
            var answer = 0.0;
            for (var d = 0u; d < k; d++) {
                answer = fma(keys[d], decays[d] * states[first + d * v], answer);
            }
            error -= answer;
        }
        wrong = fma(error, error, wrong);
        let write = strength * error;
        for (var d = 0u; d < k; d++) {
            var value = keys[d] * write;
            if (slot != NONE) {
                value = fma(decays[d], states[first + d * v], value);
            }
            after = fma(value, value, after);
        }
    }
    wrong = sqrt(sum_all(wrong, thread));
    after = sqrt(sum_all(after, thread));
    if (thread == 0u) {
        output[at] = after;
        // The length of a normalised key is not exactly 1, because of the epsilon under its root.
        output[at + 1u] = sqrt(squares) / norm * strength * wrong;
        output[at + 2u] = wrong;
        output[at + 3u] = kept / f32(k);
        output[at + 4u] = strength;
    }
}
