// The router's choice: sigmoid scores, a bias that steers the choice and nothing else, and choice limited to the best
// groups of experts. Twin of `src/backend/cpu/route.rs`. The logits come from `linear`.

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
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> logits: array<f32>;           // [T, experts]
@group(0) @binding(3) var<storage, read> bias: array<f32>;             // [experts]
@group(0) @binding(4) var<storage, read_write> experts: array<u32>;    // [T, top_k]
@group(0) @binding(5) var<storage, read_write> weights: array<f32>;    // [T, top_k]

// The most experts and groups that there may be.
const EXPERTS: u32 = 1024u;
const GROUPS: u32 = 256u;

var<workgroup> keys: array<u32, EXPERTS>;      // order_key of the biased score; 0 where not to be chosen
var<workgroup> scores: array<f32, EXPERTS>;    // unbiased
var<workgroup> worth: array<u32, GROUPS>;      // of each group, as a key; 0 once it is chosen
var<workgroup> open: array<u32, GROUPS>;       // whether a group may be chosen from

// A workgroup a token.
@compute @workgroup_size(64)
fn route(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = group.x;
    for (var e = thread; e < params.experts; e += 64u) {
        let score = sigmoid(logits[row * params.experts + e]);
        scores[e] = score;
        keys[e] = order_key(bitcast<u32>(score + bias[e]));
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
            weights[row * params.top_k + n] = scores[chosen];
        }
        workgroupBarrier();
    }
    if (thread == 0u) {
        var sum = 0.0;
        for (var n = 0u; n < params.top_k; n++) {
            sum += weights[row * params.top_k + n];
        }
        var factor = params.scale;
        if (params.renormalize == 1u) {
            factor = params.scale / (sum + 1e-20);
        }
        for (var n = 0u; n < params.top_k; n++) {
            weights[row * params.top_k + n] *= factor;
        }
    }
}

// Closes all groups but the best: a group's worth is the sum of its two best biased scores.
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
