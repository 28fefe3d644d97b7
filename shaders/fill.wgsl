// Generates random numbers in weights and caches, to measure a model without its files. Counterpart of
// `src/backend/cpu/fill.rs`; the numbers are `Random::value` of `src/backend/random.rs`, to the bit.

// #import shared/halves
// #import shared/index

struct Params {
    first: u32,     // the first word of this dispatch
    words: u32,     // the end of its words
    element: u32,   // the index of the buffer's first element
    columns: u32,   // per row
    stride: u32,    // elements from one row to the next; padding is zero
    format: u32,    // the dtype that numbers are rounded to: a FORMAT_ of the layout
    packed: u32,    // whether two numbers of 16 bits share a word; otherwise they are widened to f32
    seed: u32,
    mean: f32,
    scale: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read_write> output: array<u32>;   // [rows, stride] of `format`, in words

// Mixes the bits of a word.
fn mix_bits(word: u32) -> u32 {
    var x = (word ^ (word >> 16u)) * 0x7feb352du;
    x = (x ^ (x >> 15u)) * 0x846ca68bu;
    return x ^ (x >> 16u);
}

// The element at this index of the buffer, in the bits of its format.
fn bits_at(place: u32) -> u32 {
    let column = place % params.stride;
    if (column >= params.columns) {
        return 0u;
    }
    let i = params.element + place / params.stride * params.columns + column;
    let bits = mix_bits(mix_bits(i ^ params.seed) + params.seed);
    // 24 bits in -1 .. 1, exactly; the scale is a power of two.
    let unit = f32(bits >> 8u) * 1.1920928955078125e-7 - 1.0;
    let value = bitcast<u32>(params.mean + params.scale * unit);
    if (params.format == FORMAT_F32) {
        return value;
    }
    return narrow_bits(value, params.format);
}

@compute @workgroup_size(64)
fn fill(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let word = params.first + flat(group, groups, thread);
    if (word >= params.words) {
        return;
    }
    if (params.packed == 1u) {
        output[word] = bits_at(2u * word) | (bits_at(2u * word + 1u) << 16u);
    } else if (params.format == FORMAT_F32) {
        output[word] = bits_at(word);
    } else {
        output[word] = bitcast<u32>(widen_pair(bits_at(word), params.format).x);
    }
}
