// The batch of one submission, as `src/backend/image.rs` lays it out. Not a place for activations.

// A header, then lists; the header says where each list begins. Pieces of several tokens come first in the lists of rows,
// chunks, tiles and windows, then those of a single token.
@group(0) @binding(1) var<storage, read> batch: array<u32>;

// Header words.
const TOKENS: u32 = 0u;       // tokens of all pieces
const PIECES: u32 = 1u;       // pieces
const OUTPUTS: u32 = 2u;      // output rows
const AT_TOKENS: u32 = 3u;    // [T]: token ids
const AT_OWNERS: u32 = 4u;    // [T]: the piece of each token
const AT_PIECES: u32 = 5u;    // [P, PIECE]: see below
const AT_OUTPUTS: u32 = 6u;   // [O, 2]: row, target or NONE
const AT_ROWS: u32 = 7u;      // [T]: rows of pieces of several tokens, then those of single ones
const AT_CHUNKS: u32 = 8u;    // [chunks, 4]: first row, length, piece, slot of the checkpoint at its end or NONE
const AT_TILES: u32 = 9u;     // [tiles, 2]: piece, first token of the piece
const AT_WINDOWS: u32 = 10u;  // [windows, 4]: piece, first position, positions, first tile of the piece
const SEVERAL_ROWS: u32 = 11u; // rows of pieces of several tokens
const AT_SPANS: u32 = 12u;    // [spans, 2]: positions that a decode takes apart: number of the single row, first position
const AT_SPANNED: u32 = 13u;  // [single rows, 2]: the row's first span, and how many
// Words 14 to 18 count chunks, tiles and spans, for kernels whose grids are larger than the batch; shaders need them not.

// Words of a piece.
const PIECE: u32 = 10u;
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

// Word `field` of piece `piece`.
fn piece_word(piece: u32, field: u32) -> u32 {
    return batch[batch[AT_PIECES] + piece * PIECE + field];
}

// The piece of row `row`.
fn owner(row: u32) -> u32 {
    return batch[batch[AT_OWNERS] + row];
}
