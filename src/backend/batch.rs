//! What differs between two submissions of one step: tokens, lengths, slots, block tables.
//!
//! A batch is ragged: pieces of several sequences laid end to end, a 500-token piece of a prompt beside thirty
//! single-token decodes. It holds numbers only; which slot or block belongs to whom was settled before.

use super::{Block, Slot};

/// The most that a step's batches may hold; buffers and grids are planned for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Capacity {
    /// Tokens, over all pieces.
    pub tokens: usize,
    /// Pieces.
    pub pieces: usize,
    /// Rows whose logits are wanted.
    pub outputs: usize,
    /// Entries of all block tables together.
    pub blocks: usize,
    /// State checkpoints, over all pieces.
    pub checkpoints: usize,
}

impl Capacity {
    /// The first size that is beyond `most`: what it counts, the most there may be, and what was found.
    pub(crate) fn beyond(&self, most: &Self) -> Option<(&'static str, usize, usize)> {
        [
            ("tokens", most.tokens, self.tokens),
            ("pieces", most.pieces, self.pieces),
            ("output rows", most.outputs, self.outputs),
            ("block table entries", most.blocks, self.blocks),
            ("state checkpoints", most.checkpoints, self.checkpoints),
        ]
        .into_iter()
        .find(|(_, most, found)| found > most)
    }
}

/// One submission: the tokens of all pieces end to end, and what they belong to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token ids, `sum of piece lengths` of them.
    pub tokens: Vec<u32>,
    /// The pieces, in the order of their tokens.
    pub pieces: Vec<Piece>,
    /// The rows whose logits are wanted, ascending.
    pub outputs: Vec<OutputRow>,
}

/// Consecutive tokens of one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Tokens in this piece; 0 is allowed, and copies the state.
    pub length: usize,
    /// Tokens of the sequence before this piece.
    pub position: usize,
    /// The slot that holds the state at `position`; `None` is the zero state that starts a sequence.
    pub slot_in: Option<Slot>,
    /// The slot that takes the state after the piece; it may be `slot_in`.
    pub slot_out: Slot,
    /// Places inside the piece whose state is kept as well, ascending. A chunk of the recurrence ends at each, so that
    /// a sequence resumed there repeats the very operations.
    pub checkpoints: Vec<StateCheckpoint>,
    /// The sequence's block table, from its first token to the last of this piece.
    pub blocks: Vec<Block>,
}

/// A copy of the state after the first `after` tokens of a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateCheckpoint {
    /// Tokens of the piece, `1..=length`.
    pub after: usize,
    /// The slot that takes the copy.
    pub slot: Slot,
}

/// A row of the batch whose logits are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutputRow {
    /// The token's place in [`Batch::tokens`].
    pub row: usize,
    /// A token whose logit is reported beside the candidates (the next one of a text that is scored).
    pub target: Option<u32>,
}

impl Batch {
    /// What this batch holds: the least capacity that it fits.
    #[must_use]
    pub fn size(&self) -> Capacity {
        Capacity {
            tokens: self.tokens.len(),
            pieces: self.pieces.len(),
            outputs: self.outputs.len(),
            blocks: self.pieces.iter().map(|piece| piece.blocks.len()).sum(),
            checkpoints: self
                .pieces
                .iter()
                .map(|piece| piece.checkpoints.len())
                .sum(),
        }
    }

    /// The place of each piece's first token in [`Batch::tokens`].
    pub fn starts(&self) -> impl Iterator<Item = usize> + '_ {
        self.pieces.iter().scan(0, |at, piece| {
            let start = *at;
            *at += piece.length;
            Some(start)
        })
    }
}
