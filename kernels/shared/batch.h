// The batch of one submission, as `src/backend/image.rs` lays it out: a list of words on the device. A header, then lists;
// the header says where each list begins. Segments of several tokens come first in the lists of rows, chunks, tiles and
// windows, then those of a single token.
//
// Grids may be larger than the batch, so that one CUDA graph serves many: a block beyond the last returns.
#pragma once

// Header words.
enum {
    TOKENS = 0,        // tokens of all segments
    SEGMENTS = 1,        // segments
    OUTPUTS = 2,       // output rows
    AT_TOKENS = 3,     // [T]: token ids
    AT_OWNERS = 4,     // [T]: the segment of each token
    AT_SEGMENTS = 5,     // [P, SEGMENT]: see below
    AT_OUTPUTS = 6,    // [O, 2]: row, target or NONE
    AT_ROWS = 7,       // [T]: rows of segments of several tokens, then those of single ones
    AT_CHUNKS = 8,     // [chunks, 4]: first row, length (at most 16), segment, slot of the checkpoint at its end or NONE
    AT_TILES = 9,      // [tiles, 2]: segment, first token of the segment (a multiple of 16)
    AT_WINDOWS = 10,   // [windows, 4]: segment, first position, positions, first tile of the segment
    SEVERAL_ROWS = 11, // rows of segments of several tokens
    AT_SPANS = 12,     // [spans, 2]: positions that a decode takes apart: number of the single row, first position
    AT_SPANNED = 13,   // [single rows, 2]: the row's first span, and how many
    SEVERAL_CHUNKS = 14, // chunks of segments of several tokens
    CHUNK_TOTAL = 15,  // chunks of all segments
    SEVERAL_TILES = 16, // tiles of segments of several tokens
    TILE_TOTAL = 17,   // tiles of all segments
    SPAN_TOTAL = 18,   // spans
    AT_SCANS = 19,     // [scans, 4]: segment, first chunk, chunks, number of the split or NONE: splits first, then the
                       // longest first, then segments of single tokens
    AT_CUTS = 20,      // [cuts, 3]: segment that is cut into splits, number of its first split, splits
    SCAN_TOTAL = 21,   // scans of all segments
    SEVERAL_SCANS = 22, // scans of segments of several tokens
    SPLIT_TOTAL = 23, // splits
    CUT_TOTAL = 24,    // segments that are cut
    HEADER = 25,
};

// Words of a segment.
enum {
    START = 0,         // its first row
    LENGTH = 1,        // tokens; 0 copies the state
    POSITION = 2,      // tokens of the sequence before it
    SLOT_IN = 3,       // or NONE: the zero state
    SLOT_OUT = 4,
    BLOCKS = 5,        // where in the batch its block table begins
    CHECKPOINTS = 6,   // where in the batch its checkpoints begin: [n, 2]: after, slot
    CHECKPOINT_COUNT = 7,
    CHUNKS = 8,        // its first chunk
    CHUNK_COUNT = 9,
    SEGMENT = 10,        // words a segment
};

// Word `field` of segment `segment`.
static __device__ __forceinline__ u32 segment_word(const u32* batch, u32 segment, u32 field) {
    return batch[batch[AT_SEGMENTS] + segment * SEGMENT + field];
}

// A run of at most 32 words that a warp reads at once, a lane each: one wait for all of them. Every lane comes, for each word.
struct Words {
    u32 own;
    __device__ __forceinline__ u32 operator[](u32 i) const { return __shfl_sync(EVERY_LANE, own, (int)i); }
};
static __device__ __forceinline__ Words words_at(const u32* at, u32 count) { return Words{at[min(threadIdx.x % 32, count - 1)]}; }

// The segment of row `row`.
static __device__ __forceinline__ u32 owner(const u32* batch, u32 row) { return batch[batch[AT_OWNERS] + row]; }
