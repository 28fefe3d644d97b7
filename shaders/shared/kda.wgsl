// Definitions for both forms of the gated delta rule: the offsets of a head's queries, keys, values, gates and states.

struct Params {
    key_heads: u32,
    heads: u32,        // of values, gates and states
    key_width: u32,    // K
    value_width: u32,  // V
    form: u32,         // BY_LENGTH, ALL_CHUNKS or ALL_STEPS
    layer: u32,        // in `trace_kda`: the layer that is traced
    layers: u32,       // in `trace_kda`: the number of layers
}

@group(0) @binding(0) var<uniform> params: Params;

// Added to the sum of squares under the root that normalises queries and keys.
const L2_EPS: f32 = 1e-6;

// Elements per row of `qkv`.
fn channels() -> u32 {
    return 2u * params.key_heads * params.key_width + params.heads * params.value_width;
}

// The first element of a head's query in row `row` of `qkv`. The key is `key_heads K` further on.
fn query_at(row: u32, head: u32) -> u32 {
    return row * channels() + head / (params.heads / params.key_heads) * params.key_width;
}

// The first element of a head's value.
fn value_at(row: u32, head: u32) -> u32 {
    return row * channels() + 2u * params.key_heads * params.key_width + head * params.value_width;
}

// The first element of a head's gates in row `row` of `[T, H K]`.
fn gates_at(row: u32, head: u32) -> u32 {
    return (row * params.heads + head) * params.key_width;
}

// The first element of a head's state `[K, V]` in a slot.
fn state_at(slot: u32, head: u32) -> u32 {
    return (slot * params.heads + head) * params.key_width * params.value_width;
}

// Whether segments of this length run by chunks.
fn by_chunks(length: u32) -> bool {
    return params.form == ALL_CHUNKS || (params.form == BY_LENGTH && length > 1u);
}
