// The next token of a row: its best candidates, its log-normaliser, and whether all logits are finite. Counterpart of
// `src/backend/cpu/select.rs`.
//
// Two dispatches: `select_slices` cuts a row into slices of 1024 logits and writes each slice's candidates and partial sums;
// `select_merge` merges the slices of a row. Logits are read as bits: infinities and NaN are detected by their exponent,
// never by comparing floats.

// #import shared/batch
// #import shared/sums
// #import shared/best

struct Params {
    vocabulary: u32,
    candidates: u32,
    slices: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> logits: array<u32>;            // [O, vocabulary], the bits of f32
@group(0) @binding(3) var<storage, read_write> slices_out: array<u32>;  // [O, slices, 4 + 2 candidates]
@group(0) @binding(4) var<storage, read> slices: array<u32>;            // [O, slices, 4 + 2 candidates]
@group(0) @binding(5) var<storage, read_write> choices: array<u32>;     // [O, 4 + 2 candidates]

// Logits per slice.
const SLICE: u32 = 1024u;

// A record: for a slice its greatest logit, for a row the log-normaliser; a slice's sum of exponentials; whether all logits
// are finite; for a row the target's logit. Then the candidates: id, logit.
fn record() -> u32 {
    return 4u + 2u * params.candidates;
}

const EXPONENT: u32 = 0x7f800000u;

// One workgroup per slice (x) of a row (y).
@compute @workgroup_size(64)
fn select_slices(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = group.y * params.vocabulary;
    let first = group.x * SLICE;
    let end = min(params.vocabulary, first + SLICE);
    let to = (group.y * params.slices + group.x) * record();
    var wrong = 0.0;
    for (var i = first + thread; i < end; i += 64u) {
        if ((logits[row + i] & EXPONENT) == EXPONENT) {
            wrong = 1.0;
        }
    }
    wrong = max_all(wrong, thread);
    var last = Rival(0xffffffffu, 0u);
    var greatest = 0.0;
    for (var n = 0u; n < params.candidates; n++) {
        // The best of the candidates after the one chosen last.
        var mine = NOBODY;
        for (var i = first + thread; i < end; i += 64u) {
            let rival = Rival(order_key(logits[row + i]), i);
            if ((n == 0u || before(last, rival)) && before(rival, mine)) {
                mine = rival;
            }
        }
        last = best_of(mine, thread);
        if (n == 0u) {
            greatest = bitcast<f32>(key_bits(last.key));
        }
        if (thread == 0u) {
            slices_out[to + 4u + 2u * n] = last.id;
            slices_out[to + 5u + 2u * n] = key_bits(last.key);
        }
        if (last.id == NONE) {
            break;
        }
    }
    var sum = 0.0;
    if (wrong == 0.0) {
        for (var i = first + thread; i < end; i += 64u) {
            sum += exp(bitcast<f32>(logits[row + i]) - greatest);
        }
    }
    sum = sum_all(sum, thread);
    if (thread == 0u) {
        slices_out[to] = bitcast<u32>(greatest);
        slices_out[to + 1u] = bitcast<u32>(sum);
        slices_out[to + 2u] = u32(wrong == 0.0);
    }
}

// One workgroup per row.
@compute @workgroup_size(64)
fn select_merge(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let begin = group.x * params.slices * record();
    let to = group.x * record();
    var wrong = 0.0;
    var most = -3.0e38;
    for (var s = thread; s < params.slices; s += 64u) {
        if (slices[begin + s * record() + 2u] == 0u) {
            wrong = 1.0;
        } else {
            most = max(most, bitcast<f32>(slices[begin + s * record()]));
        }
    }
    wrong = max_all(wrong, thread);
    most = max_all(most, thread);
    var sum = 0.0;
    if (wrong == 0.0) {
        for (var s = thread; s < params.slices; s += 64u) {
            let at = begin + s * record();
            sum = fma(bitcast<f32>(slices[at + 1u]), exp(bitcast<f32>(slices[at]) - most), sum);
        }
    }
    sum = sum_all(sum, thread);
    if (thread == 0u) {
        let wanted = batch[batch[AT_OUTPUTS] + OUTPUT_WORDS * group.x + OUTPUT_TARGET];
        choices[to] = bitcast<u32>(most + log(max(sum, 1.0)));
        choices[to + 1u] = 0u;
        choices[to + 2u] = u32(wrong == 0.0);
        choices[to + 3u] = logits[group.x * params.vocabulary + min(wanted, params.vocabulary - 1u)];
    }
    var last = Rival(0xffffffffu, 0u);
    for (var n = 0u; n < params.candidates; n++) {
        var mine = NOBODY;
        for (var s = thread; s < params.slices; s += 64u) {
            // A slice's candidates are in order: the first one after the one chosen last is its best.
            for (var c = 0u; c < params.candidates; c++) {
                let at = begin + s * record() + 4u + 2u * c;
                if (slices[at] == NONE) {
                    break;
                }
                let rival = Rival(order_key(slices[at + 1u]), slices[at]);
                if (n == 0u || before(last, rival)) {
                    if (before(rival, mine)) {
                        mine = rival;
                    }
                    break;
                }
            }
        }
        last = best_of(mine, thread);
        if (thread == 0u) {
            choices[to + 4u + 2u * n] = last.id;
            choices[to + 5u + 2u * n] = key_bits(last.key);
        }
    }
}
