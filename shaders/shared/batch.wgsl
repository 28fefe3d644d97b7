// The batch of one submission: a header, then lists, as laid out in `src/backend/gpu/batch_metadata.rs`. It contains no
// activations. The header has the offset of each list. Segments of several tokens come first in the lists of rows, chunks,
// tiles and windows, then those of a single token.

// #import shared/layout

@group(0) @binding(1) var<storage, read> batch: array<u32>;   // [words]: the header, then the lists

// Word `field` of segment `segment`.
fn segment_word(segment: u32, field: u32) -> u32 {
    return batch[batch[AT_SEGMENTS] + segment * SEGMENT + field];
}

// The segment of row `row`.
fn owner(row: u32) -> u32 {
    return batch[batch[AT_OWNERS] + row];
}
