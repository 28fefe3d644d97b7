// The batch of one submission, as `src/backend/image.rs` lays it out. Not a place for activations.

// A header, then lists; the header says where each list begins. Segments of several tokens come first in the lists of rows,
// chunks, tiles and windows, then those of a single token.
@group(0) @binding(1) var<storage, read> batch: array<u32>;

// Header words.
const TOKENS: u32 = 0u;       // tokens of all segments
const SEGMENTS: u32 = 1u;       // segments
const OUTPUTS: u32 = 2u;      // output rows
const AT_TOKENS: u32 = 3u;    // [T]: token ids
const AT_OWNERS: u32 = 4u;    // [T]: the segment of each token
const AT_SEGMENTS: u32 = 5u;    // [P, SEGMENT]: see below
const AT_OUTPUTS: u32 = 6u;   // [O, 2]: row, target or NONE
const AT_ROWS: u32 = 7u;      // [T]: rows of segments of several tokens, then those of single ones
const AT_CHUNKS: u32 = 8u;    // [chunks, 4]: first row, length, segment, slot of the checkpoint at its end or NONE
const AT_TILES: u32 = 9u;     // [tiles, 2]: segment, first token of the segment
const AT_WINDOWS: u32 = 10u;  // [windows, 4]: segment, first position, positions, first tile of the segment
const SEVERAL_ROWS: u32 = 11u; // rows of segments of several tokens
const AT_SPANS: u32 = 12u;    // [spans, 2]: positions that a decode takes apart: number of the single row, first position
const AT_SPANNED: u32 = 13u;  // [single rows, 2]: the row's first span, and how many
// Words 14 to 18 count chunks, tiles and spans, for kernels whose grids are larger than the batch; shaders need them not.

// Words of a segment.
const SEGMENT: u32 = 10u;
const START: u32 = 0u;        // its first row
const LENGTH: u32 = 1u;
const POSITION: u32 = 2u;     // tokens of the sequence before it
const SLOT_IN: u32 = 3u;      // or NONE: the zero state
const SLOT_OUT: u32 = 4u;
const BLOCKS: u32 = 5u;       // where its block table begins
const CHECKPOINTS: u32 = 6u;  // where its checkpoints begin: [n, 2]: after, slot
const CHECKPOINT_COUNT: u32 = 7u;
const CHUNKS: u32 = 8u;       // its first chunk
const CHUNK_COUNT: u32 = 9u;

const NONE: u32 = 0xffffffffu;

// Word `field` of segment `segment`.
fn segment_word(segment: u32, field: u32) -> u32 {
    return batch[batch[AT_SEGMENTS] + segment * SEGMENT + field];
}

// The segment of row `row`.
fn owner(row: u32) -> u32 {
    return batch[batch[AT_OWNERS] + row];
}
