// What a KDA layer is about to do to its states, in numbers. Twin of `trace_kda` in `src/backend/cpu/trace.rs`.
//
// Runs before the recurrence and reads the state that it is about to edit. Rows of pieces that are not single tokens are
// zero. The arithmetic is that of `kda_step`, a column a thread.

// #import shared/batch
// #import shared/sums
// #import shared/kda

@group(0) @binding(2) var<storage, read> qkv: array<f32>;             // [T, channels]
@group(0) @binding(3) var<storage, read> gates: array<f32>;           // [T, H K]
@group(0) @binding(4) var<storage, read> beta: array<f32>;            // [T, H]
@group(0) @binding(5) var<storage, read> states: array<f32>;          // [slots, H, K, V]
@group(0) @binding(6) var<storage, read_write> output: array<f32>;    // [T, H, NUMBERS]

// Numbers a head: the norm of the state after the token, of the write, of the error, the mean decay, the write strength.
const NUMBERS: u32 = 5u;

// Row `d` of the state before the token, decayed, in one column.
fn decayed(slot: u32, row: u32, head: u32, d: u32, column: u32) -> f32 {
    if (slot == NONE) {
        return 0.0;
    }
    return exp(gates[gates_at(row, head) + d]) * states[state_at(slot, head) + d * params.value_width + column];
}

// A workgroup a token (x) and head (y).
@compute @workgroup_size(64)
fn trace_kda(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = group.x;
    let head = group.y;
    let piece = owner(row);
    let at = (row * params.heads + head) * NUMBERS;
    if (piece_word(piece, LENGTH) != 1u) {
        if (thread < NUMBERS) {
            output[at + thread] = 0.0;
        }
        return;
    }
    let k = params.key_width;
    let v = params.value_width;
    let slot = piece_word(piece, SLOT_IN);
    let key = query_at(row, head) + params.key_heads * k;
    let strength = beta[row * params.heads + head];
    var squares = 0.0;
    var kept = 0.0;
    for (var d = thread; d < k; d += 64u) {
        squares = fma(qkv[key + d], qkv[key + d], squares);
        kept += exp(gates[gates_at(row, head) + d]);
    }
    squares = sum_all(squares, thread);
    kept = sum_all(kept, thread);
    let norm = sqrt(squares + L2_EPS);

    var wrong = 0.0;
    var after = 0.0;
    for (var column = thread; column < v; column += 64u) {
        var answer = 0.0;
        for (var d = 0u; d < k; d++) {
            answer = fma(qkv[key + d] / norm, decayed(slot, row, head, d, column), answer);
        }
        let error = qkv[value_at(row, head) + column] - answer;
        wrong = fma(error, error, wrong);
        let write = strength * error;
        for (var d = 0u; d < k; d++) {
            let value = fma(qkv[key + d] / norm, write, decayed(slot, row, head, d, column));
            after = fma(value, value, after);
        }
    }
    wrong = sqrt(sum_all(wrong, thread));
    after = sqrt(sum_all(after, thread));
    if (thread == 0u) {
        output[at] = after;
        // A key's own length is not quite 1: its root has an epsilon.
        output[at + 1u] = sqrt(squares) / norm * strength * wrong;
        output[at + 2u] = wrong;
        output[at + 3u] = kept / f32(k);
        output[at + 4u] = strength;
    }
}
