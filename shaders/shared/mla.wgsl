// What both forms of latent attention share: widths, and where a position's row is cached.

// #import shared/latents

struct Params {
    heads: u32,
    latent: u32,
    nope: u32,
    rope: u32,
    value: u32,
    block_tokens: u32,
    first_row: u32,   // the rows of kv_b in this buffer
    rows: u32,
    stride: u32,      // vectors a row of kv_b
    begin: u32,       // the window of a prefill; in `mla_decode` 1 where only single tokens are worked on
    head: u32,        // in `trace_attention`: the one that is traced
    places: u32,      // in `trace_attention`: positions a row of its output
}

@group(0) @binding(0) var<uniform> params: Params;

// The first score of a running maximum: below all others, yet a number.
const LOWEST: f32 = -3.0e38;

// Width of a key.
fn key_width() -> u32 {
    return params.nope + params.rope;
}

// What scores are multiplied with.
fn score_scale() -> f32 {
    return 1.0 / sqrt(f32(params.nope + params.rope));
}

// The first word of the cached row at `position` of a segment's sequence.
fn latent_at(segment: u32, position: u32) -> u32 {
    let block = batch[segment_word(segment, BLOCKS) + position / params.block_tokens];
    return (block * params.block_tokens + position % params.block_tokens) * latent_words(params.latent + params.rope);
}
