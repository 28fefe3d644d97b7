// The short convolution of a KDA layer: causal, depthwise, followed by SiLU, with its convolution state carried between
// segments. Counterpart of `src/backend/cpu/short_conv.rs`. One dispatch computes the outputs, a second one writes the
// convolution states.

// #import shared/batch
// #import shared/index
// #import shared/activations

struct Params {
    channels: u32,
    taps: u32,
    stride: u32,  // elements per row of `weight`
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> input: array<f32>;          // [T, channels]
@group(0) @binding(3) var<storage, read> weight: array<f32>;         // [channels, stride]
@group(0) @binding(4) var<storage, read_write> conv_states: array<f32>;    // [slots, channels, taps - 1], oldest first
@group(0) @binding(5) var<storage, read_write> output: array<f32>;   // [T, channels]

// The offset of channel `c` of a slot's convolution state.
fn conv_state(slot: u32, c: u32) -> u32 {
    return (slot * params.channels + c) * (params.taps - 1u);
}

// The input of channel `c`, `back` tokens before token `t` of the segment; `back` is below `taps`.
fn input_at(start: u32, t: u32, back: u32, slot: u32, c: u32) -> f32 {
    if (t >= back) {
        return input[(start + t - back) * params.channels + c];
    }
    if (slot == NONE) {
        return 0.0;
    }
    return conv_states[conv_state(slot, c) + params.taps - 1u + t - back];
}

// y_t[c] = silu(sum_j w[c, j] x_{t - taps + 1 + j}[c]); one thread per element.
@compute @workgroup_size(64)
fn convolve(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let i = flat(group, groups, thread);
    let row = i / params.channels;
    let c = i % params.channels;
    if (row >= batch[TOKENS]) {
        return;
    }
    let segment = owner(row);
    let start = segment_word(segment, START);
    let slot = segment_word(segment, SLOT_IN);
    var sum = 0.0;
    for (var j = 0u; j < params.taps; j++) {
        let x = input_at(start, row - start, params.taps - 1u - j, slot, c);
        sum = fma(weight[c * params.stride + j], x, sum);
    }
    output[i] = silu(sum);
}

// Writes the convolution state of channel `c` after `after` tokens. Oldest first, so that a slot may be read and written at
// the same time: the value written at i was read from i or later.
fn keep(segment: u32, after: u32, slot: u32, c: u32) {
    let start = segment_word(segment, START);
    let slot_in = segment_word(segment, SLOT_IN);
    for (var i = 0u; i + 1u < params.taps; i++) {
        conv_states[conv_state(slot, c) + i] = input_at(start, after, params.taps - 1u - i, slot_in, c);
    }
}

// The convolution states at a segment's checkpoints, then at its end; one thread per segment and channel.
@compute @workgroup_size(64)
fn keep_conv_states(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let i = flat(group, groups, thread);
    let segment = i / params.channels;
    let c = i % params.channels;
    if (segment >= batch[SEGMENTS]) {
        return;
    }
    let checkpoints = segment_word(segment, CHECKPOINTS);
    for (var n = 0u; n < segment_word(segment, CHECKPOINT_COUNT); n++) {
        keep(segment, batch[checkpoints + CHECKPOINT_WORDS * n + CHECKPOINT_AFTER], batch[checkpoints + CHECKPOINT_WORDS * n + CHECKPOINT_SLOT], c);
    }
    keep(segment, segment_word(segment, LENGTH), segment_word(segment, SLOT_OUT), c);
}
