// Draws tokens from rows of logits. Counterpart of `src/backend/cpu/sample.rs`; `src/backend/draw.rs` defines what is drawn.
//
// A row is cut into at most 256 slices. `sample_change` writes a copy of a row whose logits a draw changes; `sample_best` finds
// each slice's best token; `sample_narrow` counts or weighs the tokens by eight bits of their keys, from the upper ones on,
// until the key is known at which `top_k` or `top_p` is reached; `sample_sum` sums the weights of each slice's kept tokens;
// `sample_draw` finds the token. Weights and their sums are integers, so no result depends on an order.

// #import shared/batch
// #import shared/order

struct Params {
    vocabulary: u32,
    slice: u32,    // logits per slice
    slices: u32,
    by_weight: u32, // what is narrowed: 0 for the number of tokens (top_k), 1 for their weight (top_p)
    level: u32,    // of the four levels of eight bits, the one that is counted
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> logits: array<u32>;               // [O, vocabulary], the bits of f32
@group(0) @binding(3) var<storage, read_write> changed_out: array<u32>;    // [changed draws, vocabulary], the bits of f32
@group(0) @binding(4) var<storage, read> changed: array<u32>;              // the same
@group(0) @binding(5) var<storage, read_write> best_out: array<u32>;       // [draws, slices, 2]: key, id
@group(0) @binding(6) var<storage, read> best: array<u32>;                 // the same
@group(0) @binding(7) var<storage, read_write> cells: array<atomic<u32>>;  // [draws, 2, 4, 256, 3]: sums in units of 1, 2^11, 2^22
@group(0) @binding(8) var<storage, read_write> sums_out: array<u32>;       // [draws, slices, 3]: lower and upper word, ties
@group(0) @binding(9) var<storage, read> sums: array<u32>;                 // the same
@group(0) @binding(10) var<storage, read_write> drawn: array<u32>;         // [draws, 2]: token or NONE, the bits of its logit

const THREADS: u32 = 256u;
// Words of a draw's cells.
const CELLS: u32 = 2u * 4u * 256u * 3u;
// A distance of 31 binary orders and more has no weight.
const FARTHEST: f32 = 2080374784.0;
// The bits of a logit that is removed; its key is 0.
const REMOVED: u32 = 0xffffffffu;

var<workgroup> scanned: array<vec2<u32>, THREADS>;
var<workgroup> leaders: array<vec2<u32>, THREADS>;
var<workgroup> parts: array<vec3<u32>, THREADS>;
var<workgroup> counts: array<atomic<u32>, 768>;
var<workgroup> crossing: vec4<u32>;

fn draw_word(draw: u32, field: u32) -> u32 {
    return batch[batch[AT_DRAWS] + draw * DRAW_WORDS + field];
}

// What the loops over a row read of its draw.
var<private> row_start: u32;
var<private> copy_start: u32;   // NONE if no logit is changed
var<private> mask_start: u32;   // NONE if all tokens are allowed
var<private> scale: f32;
var<private> least: u32;

fn open_row(draw: u32) {
    row_start = draw_word(draw, DRAW_ROW) * params.vocabulary;
    let copied = draw_word(draw, DRAW_CHANGED);
    copy_start = select(copied * params.vocabulary, NONE, copied == NONE);
    mask_start = draw_word(draw, DRAW_ALLOWED);
    scale = bitcast<f32>(draw_word(draw, DRAW_SCALE));
    least = draw_word(draw, DRAW_LEAST);
}

// The bits of a logit, REMOVED if the draw does not allow the token.
fn allowed_bits(i: u32) -> u32 {
    if (mask_start != NONE && ((batch[mask_start + i / 32u] >> (i % 32u)) & 1u) == 0u) {
        return REMOVED;
    }
    return logits[row_start + i];
}

// A token's key after all changes; 0 if it is removed.
fn key_of(i: u32) -> u32 {
    if (copy_start != NONE) {
        return order_key(changed[copy_start + i]);
    }
    return order_key(allowed_bits(i));
}

// a + b, a - b and a * b of 64 bits, the lower word first.
fn add(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    let low = a.x + b.x;
    return vec2<u32>(low, a.y + b.y + u32(low < a.x));
}
fn subtract(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    return vec2<u32>(a.x - b.x, a.y - b.y - u32(a.x < b.x));
}
fn less(a: vec2<u32>, b: vec2<u32>) -> bool {
    return a.y < b.y || (a.y == b.y && a.x < b.x);
}
fn high(a: u32, b: u32) -> u32 {
    let low = (a & 0xffffu) * (b & 0xffffu);
    let first = (a >> 16u) * (b & 0xffffu) + (low >> 16u);
    let second = (a & 0xffffu) * (b >> 16u) + (first & 0xffffu);
    return (a >> 16u) * (b >> 16u) + (first >> 16u) + (second >> 16u);
}
fn product(a: u32, b: u32) -> vec2<u32> {
    return vec2<u32>(a * b, high(a, b));
}

// sum * share / 2^32, rounded down.
fn share_of(sum: vec2<u32>, share: u32) -> vec2<u32> {
    return add(product(sum.y, share), vec2<u32>(high(sum.x, share), 0u));
}

// 2^(31 - distance / 2^26): the same integers as in `draw.rs`.
fn weight(distance: u32) -> u32 {
    let y = ~(distance << 6u);
    var sum = 3840493u;
    sum = 19755534u + high(sum, y);
    sum = 119522614u + high(sum, y);
    sum = 515841022u + high(sum, y);
    sum = 1488523067u + high(sum, y);
    return (0x80000000u + high(sum, y)) >> ((distance >> 26u) + 1u);
}

// The weight of a key; `greatest` is the greatest logit.
fn weight_of(greatest: f32, key: u32) -> u32 {
    let distance = (greatest - bitcast<f32>(key_bits(key))) * scale;
    if (key == 0u || !(distance < FARTHEST)) {
        return 0u;
    }
    return weight(u32(distance));
}

// The same, 0 below the least weight that the draw keeps.
fn kept_weight(greatest: f32, key: u32) -> u32 {
    let found = weight_of(greatest, key);
    return select(0u, found, found >= least);
}

// The sum of the values of this thread and those before it. The last one is the sum of all.
fn scan(value: vec2<u32>, thread: u32) -> vec2<u32> {
    workgroupBarrier();
    scanned[thread] = value;
    for (var step = 1u; step < THREADS; step *= 2u) {
        workgroupBarrier();
        var other = vec2<u32>(0u, 0u);
        if (thread >= step) {
            other = scanned[thread - step];
        }
        workgroupBarrier();
        scanned[thread] = add(scanned[thread], other);
    }
    workgroupBarrier();
    return scanned[thread];
}

// The sum of all threads' values, two words each, and of their third words; returned to thread 0.
fn sum_parts(value: vec3<u32>, thread: u32) -> vec3<u32> {
    parts[thread] = value;
    for (var half = THREADS / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (thread < half) {
            let other = parts[thread + half];
            let mine = parts[thread];
            parts[thread] = vec3<u32>(add(mine.xy, other.xy), mine.z + other.z);
        }
    }
    return parts[thread];
}

// The best of all threads' keys, with its id; of equal ones the lower id.
fn best_of_all(key: u32, id: u32, thread: u32) -> vec2<u32> {
    workgroupBarrier();
    leaders[thread] = vec2<u32>(key, id);
    for (var half = THREADS / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (thread < half) {
            let other = leaders[thread + half];
            let mine = leaders[thread];
            if (other.x > mine.x || (other.x == mine.x && other.y < mine.y)) {
                leaders[thread] = other;
            }
        }
    }
    return workgroupUniformLoad(&leaders[0]);
}

// The best token of a draw: its key and id.
fn best_token(draw: u32, thread: u32) -> vec2<u32> {
    var mine = vec2<u32>(0u, NONE);
    if (thread < params.slices) {
        let at = 2u * (draw * params.slices + thread);
        mine = vec2<u32>(best[at], best[at + 1u]);
    }
    return best_of_all(mine.x, mine.y, thread);
}

// The key's upper bits at which a goal is reached, how much of the goal greater keys leave, and whether it is reached.
struct Narrowed {
    key: u32,
    left: vec2<u32>,
    reached: bool,
}

// Follows the first `levels` levels. `extra` is added to the weight of all tokens, which the goal of a top_p is a share of.
fn narrowed(draw: u32, by_weight: u32, levels: u32, extra: vec2<u32>, thread: u32) -> Narrowed {
    var key = 0u;
    var left = vec2<u32>(draw_word(draw, DRAW_TOP_K), 0u);
    for (var level = 0u; level < levels; level++) {
        // Greater keys first.
        let digit = 255u - thread;
        let at = 3u * (((2u * draw + by_weight) * 4u + level) * 256u + digit);
        let middle = atomicLoad(&cells[at + 1u]);
        let upper = atomicLoad(&cells[at + 2u]);
        var own = vec2<u32>(atomicLoad(&cells[at]), 0u);
        own = add(own, vec2<u32>(middle << 11u, middle >> 21u));
        own = add(own, vec2<u32>(upper << 22u, upper >> 10u));
        let upto = scan(own, thread);
        let sum = scanned[THREADS - 1u];
        if (level == 0u && by_weight == 1u) {
            left = share_of(add(sum, extra), draw_word(draw, DRAW_TOP_P));
            left.x += u32(left.x == 0u && left.y == 0u);
        }
        let before = subtract(upto, own);
        workgroupBarrier();
        if (thread == 0u) {
            let rest = subtract(left, sum);
            crossing = vec4<u32>(NONE, rest.x, rest.y, 0u);
        }
        workgroupBarrier();
        if (less(before, left) && !less(upto, left)) {
            let rest = subtract(left, before);
            crossing = vec4<u32>(digit, rest.x, rest.y, 0u);
        }
        let found = workgroupUniformLoad(&crossing);
        left = vec2<u32>(found.y, found.z);
        if (found.x == NONE) {
            return Narrowed(0u, left, false);
        }
        key |= found.x << (24u - 8u * level);
    }
    return Narrowed(key, left, true);
}

// The last key that is kept, and how many tokens with that key are, those with the lowest ids.
struct Cut {
    key: u32,
    ties: u32,
}

fn cut_by_count(draw: u32, thread: u32) -> Cut {
    if (draw_word(draw, DRAW_TOP_K) == 0u) {
        return Cut(0u, 0u);
    }
    let found = narrowed(draw, 0u, 4u, vec2<u32>(0u, 0u), thread);
    if (!found.reached) {
        return Cut(0u, 0u);
    }
    return Cut(found.key, found.left.x);
}

fn cut_of(draw: u32, greatest: f32, thread: u32) -> Cut {
    let most = cut_by_count(draw, thread);
    if (draw_word(draw, DRAW_TOP_P) == 0u) {
        return most;
    }
    let extra = product(most.ties, weight_of(greatest, most.key));
    let found = narrowed(draw, 1u, 4u, extra, thread);
    // Keys above the one that top_k ends at were weighed: a goal that they do not reach is reached among its ties.
    let key = select(most.key, found.key, found.reached);
    let each = weight_of(greatest, key);
    // The fewest ties whose weights reach what is left.
    var fewer = 0u;
    for (var bit = 1u << 20u; bit > 0u; bit >>= 1u) {
        if (less(product(fewer + bit, each), found.left)) {
            fewer += bit;
        }
    }
    return Cut(key, fewer + 1u);
}

// One workgroup per slice (x) of a draw (y).
@compute @workgroup_size(256)
fn sample_change(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let draw = group.y;
    open_row(draw);
    let row = draw_word(draw, DRAW_CHANGED);
    if (row == NONE) {
        return;
    }
    let first = group.x * params.slice;
    let end = min(params.vocabulary, first + params.slice);
    let to = row * params.vocabulary;
    for (var i = first + thread; i < end; i += THREADS) {
        changed_out[to + i] = allowed_bits(i);
    }
    storageBarrier();
    let list = draw_word(draw, DRAW_CHANGES);
    let count = draw_word(draw, DRAW_CHANGE_COUNT);
    for (var n = thread; n < count; n += THREADS) {
        let at = list + n * CHANGE_WORDS;
        let i = batch[at + CHANGE_TOKEN];
        if (i >= first && i < end && changed_out[to + i] != REMOVED) {
            let logit = bitcast<f32>(changed_out[to + i]);
            let factor = bitcast<f32>(select(batch[at + CHANGE_NEGATIVE], batch[at + CHANGE_POSITIVE], logit > 0.0));
            let moved = logit * factor + bitcast<f32>(batch[at + CHANGE_ADD]);
            changed_out[to + i] = bitcast<u32>(clamp(moved, -3.4028234e38, 3.4028234e38));
        }
    }
}

// One workgroup per slice (x) of a draw (y).
@compute @workgroup_size(256)
fn sample_best(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let draw = group.y;
    open_row(draw);
    let first = group.x * params.slice;
    let end = min(params.vocabulary, first + params.slice);
    var key = 0u;
    var id = NONE;
    for (var i = first + thread; i < end; i += THREADS) {
        let other = key_of(i);
        if (other > key) {
            key = other;
            id = i;
        }
    }
    let found = best_of_all(key, id, thread);
    if (thread == 0u) {
        let at = 2u * (draw * params.slices + group.x);
        best_out[at] = found.x;
        best_out[at + 1u] = found.y;
    }
    if (group.x == 0u) {
        for (var i = thread; i < CELLS; i += THREADS) {
            atomicStore(&cells[draw * CELLS + i], 0u);
        }
    }
}

// Most parts of most weights are 0.
fn count_limb(at: u32, amount: u32) {
    if (amount > 0u) {
        atomicAdd(&counts[at], amount);
    }
}

// One workgroup per slice (x) of a draw (y).
@compute @workgroup_size(256)
fn sample_narrow(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let draw = group.y;
    open_row(draw);
    let by_weight = params.by_weight;
    if (draw_word(draw, select(DRAW_TOP_K, DRAW_TOP_P, by_weight == 1u)) == 0u) {
        return;
    }
    let greatest = bitcast<f32>(key_bits(best_token(draw, thread).x));
    var above = 0u;
    var extra = vec2<u32>(0u, 0u);
    if (by_weight == 1u) {
        let most = cut_by_count(draw, thread);
        above = most.key;
        extra = product(most.ties, weight_of(greatest, most.key));
    }
    let found = narrowed(draw, by_weight, params.level, extra, thread);
    if (!found.reached) {
        return;
    }
    for (var i = thread; i < 768u; i += THREADS) {
        atomicStore(&counts[i], 0u);
    }
    workgroupBarrier();
    let shift = 24u - 8u * params.level;
    // The bits of the levels before.
    let known = select(0xffffffffu << (shift + 8u), 0u, params.level == 0u);
    let first = group.x * params.slice;
    let end = min(params.vocabulary, first + params.slice);
    for (var i = first + thread; i < end; i += THREADS) {
        let key = key_of(i);
        if (key > above && (key & known) == found.key) {
            var amount = 1u;
            if (by_weight == 1u) {
                amount = weight_of(greatest, key);
            }
            let at = 3u * ((key >> shift) & 255u);
            count_limb(at, amount & 0x7ffu);
            count_limb(at + 1u, (amount >> 11u) & 0x7ffu);
            count_limb(at + 2u, amount >> 22u);
        }
    }
    workgroupBarrier();
    let to = 768u * ((2u * draw + by_weight) * 4u + params.level);
    for (var i = thread; i < 768u; i += THREADS) {
        let count = atomicLoad(&counts[i]);
        if (count > 0u) {
            atomicAdd(&cells[to + i], count);
        }
    }
}

// One workgroup per slice (x) of a draw (y).
@compute @workgroup_size(256)
fn sample_sum(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let draw = group.y;
    open_row(draw);
    if (draw_word(draw, DRAW_SCALE) == 0u) {
        return;
    }
    let greatest = bitcast<f32>(key_bits(best_token(draw, thread).x));
    let cut = cut_of(draw, greatest, thread);
    let first = group.x * params.slice;
    let end = min(params.vocabulary, first + params.slice);
    var sum = vec2<u32>(0u, 0u);
    var ties = 0u;
    for (var i = first + thread; i < end; i += THREADS) {
        let key = key_of(i);
        if (key > cut.key) {
            sum = add(sum, vec2<u32>(kept_weight(greatest, key), 0u));
        }
        ties += u32(key == cut.key);
    }
    let whole = sum_parts(vec3<u32>(sum, ties), thread);
    if (thread == 0u) {
        let at = 3u * (draw * params.slices + group.x);
        sums_out[at] = whole.x;
        sums_out[at + 1u] = whole.y;
        sums_out[at + 2u] = whole.z;
    }
}

// The sum of weights of a part whose tokens above the cut weigh `sum`, with `ties` at the cut after `before` others.
fn with_ties(cut: Cut, each: u32, sum: vec2<u32>, ties: u32, before: u32) -> vec2<u32> {
    let kept = min(ties, cut.ties - min(cut.ties, before));
    return add(sum, product(kept, each));
}

// Sets a draw's result.
fn put(draw: u32, token: u32) {
    drawn[2u * draw] = token;
    drawn[2u * draw + 1u] = logits[row_start + min(token, params.vocabulary - 1u)];
}

// One workgroup per draw.
@compute @workgroup_size(256)
fn sample_draw(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let draw = group.x;
    open_row(draw);
    let top = best_token(draw, thread);
    if (draw_word(draw, DRAW_SCALE) == 0u) {
        if (thread == 0u) {
            put(draw, top.y);
        }
        return;
    }
    let greatest = bitcast<f32>(key_bits(top.x));
    let cut = cut_of(draw, greatest, thread);
    let each = kept_weight(greatest, cut.key);
    var own = vec2<u32>(0u, 0u);
    var ties = 0u;
    if (thread < params.slices) {
        let at = 3u * (draw * params.slices + thread);
        own = vec2<u32>(sums[at], sums[at + 1u]);
        ties = sums[at + 2u];
    }
    var before = scan(vec2<u32>(ties, 0u), thread).x - ties;
    own = with_ties(cut, each, own, ties, before);
    var upto = scan(own, thread);
    let target_sum = share_of(scanned[THREADS - 1u], draw_word(draw, DRAW_RANDOM));
    var start = subtract(upto, own);
    workgroupBarrier();
    if (thread == 0u) {
        crossing = vec4<u32>(NONE, 0u, 0u, 0u);
    }
    workgroupBarrier();
    if (!less(target_sum, start) && less(target_sum, upto)) {
        let rest = subtract(target_sum, start);
        crossing = vec4<u32>(thread, rest.x, rest.y, before);
    }
    let slice = workgroupUniformLoad(&crossing);
    if (slice.x == NONE) {
        // Without any weight: no token is allowed, or the row is not finite.
        if (thread == 0u) {
            put(draw, top.y);
        }
        return;
    }
    // Consecutive tokens of the slice for each thread.
    let many = (params.slice + THREADS - 1u) / THREADS;
    let end = min(params.vocabulary, (slice.x + 1u) * params.slice);
    let first = min(end, slice.x * params.slice + thread * many);
    let last = min(end, first + many);
    own = vec2<u32>(0u, 0u);
    ties = 0u;
    for (var i = first; i < last; i++) {
        let key = key_of(i);
        if (key > cut.key) {
            own = add(own, vec2<u32>(kept_weight(greatest, key), 0u));
        }
        ties += u32(key == cut.key);
    }
    before = slice.w + scan(vec2<u32>(ties, 0u), thread).x - ties;
    own = with_ties(cut, each, own, ties, before);
    upto = scan(own, thread);
    start = subtract(upto, own);
    var left = vec2<u32>(slice.y, slice.z);
    if (less(left, start) || !less(left, upto)) {
        return;
    }
    left = subtract(left, start);
    for (var i = first; i < last; i++) {
        let key = key_of(i);
        var found = 0u;
        if (key > cut.key) {
            found = kept_weight(greatest, key);
        } else if (key == cut.key) {
            found = select(0u, each, before < cut.ties);
            before++;
        }
        if (less(left, vec2<u32>(found, 0u))) {
            put(draw, i);
            return;
        }
        left = subtract(left, vec2<u32>(found, 0u));
    }
}
