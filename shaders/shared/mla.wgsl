// Definitions for both forms of latent attention: widths, and the offset of a position's cached row.

// #import shared/latents

struct Params {
    heads: u32,
    latent: u32,
    nope: u32,
    rope: u32,
    value: u32,
    block_tokens: u32,
    first_row: u32,   // the first row of kv_b in this buffer
    rows: u32,
    stride: u32,      // vectors per row of kv_b
    begin: u32,       // the window of a prefill; in `mla_decode` 1 to process only single tokens
    head: u32,        // in `trace_attention`: the traced head
    positions: u32,   // in `trace_attention`: positions per row of its output
}

@group(0) @binding(0) var<uniform> params: Params;

// The initial value of a running maximum: less than every score, but finite.
const LOWEST: f32 = -3.0e38;

// Width of a key.
fn key_width() -> u32 {
    return params.nope + params.rope;
}

// The factor of scores.
fn score_scale() -> f32 {
    return 1.0 / sqrt(f32(params.nope + params.rope));
}

// The first word of the cached row at `position` of a segment's sequence.
fn latent_at(segment: u32, position: u32) -> u32 {
    let block = batch[segment_word(segment, BLOCKS) + position / params.block_tokens];
    return (block * params.block_tokens + position % params.block_tokens) * latent_words(params.latent + params.rope);
}
