//! What differs between two submissions of one step: tokens, lengths, slots, block tables.
//!
//! A batch is ragged: segments of several sequences laid end to end, a 500-token segment of a prompt beside thirty
//! single-token decodes. It holds numbers only; which slot or block belongs to whom was settled before.

use super::{Block, Slot};

/// The most that a step's batches may hold; buffers and grids are planned for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Capacity {
    /// Tokens, over all segments.
    pub tokens: usize,
    /// Segments.
    pub segments: usize,
    /// Rows whose logits are wanted.
    pub outputs: usize,
    /// Entries of all block tables together.
    pub blocks: usize,
    /// State checkpoints, over all segments.
    pub checkpoints: usize,
}

impl Capacity {
    /// The first size that is beyond `most`: what it counts, the most there may be, and what was found.
    pub(crate) fn beyond(&self, most: &Self) -> Option<(&'static str, usize, usize)> {
        [
            ("tokens", most.tokens, self.tokens),
            ("segments", most.segments, self.segments),
            ("output rows", most.outputs, self.outputs),
            ("block table entries", most.blocks, self.blocks),
            ("state checkpoints", most.checkpoints, self.checkpoints),
        ]
        .into_iter()
        .find(|(_, most, found)| found > most)
    }
}

/// One submission: the tokens of all segments end to end, and what they belong to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token ids, `sum of segment lengths` of them.
    pub tokens: Vec<u32>,
    /// The segments, in the order of their tokens.
    pub segments: Vec<Segment>,
    /// The rows whose logits are wanted, ascending.
    pub outputs: Vec<OutputRow>,
}

/// Consecutive tokens of one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Tokens in this segment; 0 is allowed, and copies the state.
    pub length: usize,
    /// Tokens of the sequence before this segment.
    pub position: usize,
    /// The slot that holds the state at `position`; `None` is the zero state that starts a sequence.
    pub slot_in: Option<Slot>,
    /// The slot that takes the state after the segment; it may be `slot_in`.
    pub slot_out: Slot,
    /// Places inside the segment whose state is kept as well, ascending. A chunk of the recurrence ends at each, so that
    /// a sequence resumed there repeats the very operations.
    pub checkpoints: Vec<StateCheckpoint>,
    /// The sequence's block table, from its first token to the last of this segment.
    pub blocks: Vec<Block>,
}

/// A copy of the state after the first `after` tokens of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateCheckpoint {
    /// Tokens of the segment, `1..=length`.
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
            segments: self.segments.len(),
            outputs: self.outputs.len(),
            blocks: self
                .segments
                .iter()
                .map(|segment| segment.blocks.len())
                .sum(),
            checkpoints: self
                .segments
                .iter()
                .map(|segment| segment.checkpoints.len())
                .sum(),
        }
    }

    /// The place of each segment's first token in [`Batch::tokens`].
    pub fn starts(&self) -> impl Iterator<Item = usize> + '_ {
        self.segments.iter().scan(0, |at, segment| {
            let start = *at;
            *at += segment.length;
            Some(start)
        })
    }
}
