// The router's choice: sigmoid scores, a bias that affects only the choice, and choice limited to the best groups of experts.
// Counterpart of `src/backend/cpu/route.rs`. The logits are computed by `linear`.

// #import shared/batch
// #import shared/activations
// #import shared/best

struct Params {
    experts: u32,
    top_k: u32,
    groups: u32,
    top_groups: u32,
    renormalize: u32,
    scale: f32,
    not_a_number: u32,  // the bits of NaN, which the weights of a damaged row become
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> logits: array<u32>;           // [T, experts], the bits of f32
@group(0) @binding(3) var<storage, read> bias: array<u32>;             // [experts], the bits of f32
@group(0) @binding(4) var<storage, read_write> experts: array<u32>;    // [T, top_k]
@group(0) @binding(5) var<storage, read_write> weights: array<u32>;    // [T, top_k], the bits of f32

// Maximum number of experts and of groups.
const EXPERTS: u32 = 1024u;
const GROUPS: u32 = 256u;

var<workgroup> keys: array<u32, EXPERTS>;      // order_key of the biased score; 0 if not to be chosen
var<workgroup> scores: array<f32, EXPERTS>;    // unbiased
var<workgroup> worth: array<u32, GROUPS>;      // the sum of a group's two best scores, as a key; 0 once it is chosen
var<workgroup> open: array<u32, GROUPS>;       // whether a group may be chosen from

var<workgroup> damaged: atomic<u32>;           // 1 if a logit is NaN or a bias is not finite

// The sign and the exponent of a float's bits. All exponent bits set is an infinity, or NaN with any further bit.
const SIGN: u32 = 0x80000000u;
const EXPONENT: u32 = 0x7f800000u;

// One workgroup per token.
@compute @workgroup_size(64)
fn route(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = group.x;
    if (thread == 0u) {
        atomicStore(&damaged, 0u);
    }
    workgroupBarrier();
    for (var e = thread; e < params.experts; e += 64u) {
        let logit = logits[row * params.experts + e];
        let score = sigmoid(bitcast<f32>(logit));
        scores[e] = score;
        keys[e] = order_key(bitcast<u32>(score + bitcast<f32>(bias[e])));
        if ((logit & ~SIGN) > EXPONENT || (bias[e] & EXPONENT) == EXPONENT) {
            atomicStore(&damaged, 1u);
        }
    }
    workgroupBarrier();
    if (params.top_groups < params.groups) {
        choose_groups(thread);
    }
    for (var n = 0u; n < params.top_k; n++) {
        var mine = NOBODY;
        for (var e = thread; e < params.experts; e += 64u) {
            let rival = Rival(keys[e], e);
            if (keys[e] != 0u && before(rival, mine)) {
                mine = rival;
            }
        }
        let best = best_of(mine, thread);
        if (thread == 0u) {
            let chosen = min(best.id, params.experts - 1u);
            keys[chosen] = 0u;
            experts[row * params.top_k + n] = chosen;
            weights[row * params.top_k + n] = bitcast<u32>(scores[chosen]);
        }
        workgroupBarrier();
    }
    if (thread == 0u) {
        var sum = 0.0;
        for (var n = 0u; n < params.top_k; n++) {
            sum += bitcast<f32>(weights[row * params.top_k + n]);
        }
        var factor = params.scale;
        if (params.renormalize == 1u) {
            factor = params.scale / (sum + 1e-20);
        }
        // A damaged expert might never be chosen; with NaN weights the damage is noticed.
        let damage = atomicLoad(&damaged) == 1u;
        for (var n = 0u; n < params.top_k; n++) {
            let at = row * params.top_k + n;
            weights[at] = select(bitcast<u32>(bitcast<f32>(weights[at]) * factor), params.not_a_number, damage);
            experts[at] = select(experts[at], 0u, damage);
        }
    }
}

// Marks the best groups as open: groups are compared by the sum of their two best biased scores.
fn choose_groups(thread: u32) {
    let size = params.experts / params.groups;
    for (var g = thread; g < params.groups; g += 64u) {
        var first = 0u;
        var second = 0u;
        for (var e = g * size; e < (g + 1u) * size; e++) {
            let key = keys[e];
            if (key > first) {
                second = first;
                first = key;
            } else if (key > second) {
                second = key;
            }
        }
        var sum = bitcast<f32>(key_bits(first));
        if (size > 1u) {
            sum += bitcast<f32>(key_bits(second));
        }
        worth[g] = order_key(bitcast<u32>(sum));
        open[g] = 0u;
    }
    workgroupBarrier();
    for (var n = 0u; n < params.top_groups; n++) {
        var mine = NOBODY;
        for (var g = thread; g < params.groups; g += 64u) {
            let rival = Rival(worth[g], g);
            if (worth[g] != 0u && before(rival, mine)) {
                mine = rival;
            }
        }
        let best = best_of(mine, thread);
        if (thread == 0u) {
            let chosen = min(best.id, params.groups - 1u);
            worth[chosen] = 0u;
            open[chosen] = 1u;
        }
        workgroupBarrier();
    }
    for (var e = thread; e < params.experts; e += 64u) {
        if (open[e / size] == 0u) {
            keys[e] = 0u;
        }
    }
    workgroupBarrier();
}
