//! What differs between two submissions of one step: tokens, lengths, slots, block tables.
//!
//! A batch is ragged: a concatenation of segments of several sequences, such as a 500-token segment of a prompt beside thirty
//! single-token decodes. It contains only numbers; the engine has assigned slots and blocks before.

use super::{Block, Draw, Slot};

/// Maximum sizes of a step's batches; buffers and grids are planned for them.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct Capacity {
    /// Tokens, over all segments.
    pub tokens: usize,
    /// Segments.
    pub segments: usize,
    /// Rows whose logits are requested.
    pub outputs: usize,
    /// Entries of all block tables together.
    pub blocks: usize,
    /// State checkpoints, over all segments.
    pub checkpoints: usize,
}

impl Capacity {
    /// The first size above `most`: its name, the maximum, and the value.
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

/// One submission: the tokens of all segments, and the slots and blocks of their sequences.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Batch {
    /// Token ids, `sum of segment lengths` of them.
    pub tokens: Vec<u32>,
    /// The segments, in the order of their tokens.
    pub segments: Vec<Segment>,
    /// The rows whose logits are requested, ascending.
    pub outputs: Vec<OutputRow>,
    /// The draws from these rows, for a step that [samples](super::Op::Sample).
    pub draws: Vec<Draw>,
    /// Tokens that are not known on the host yet, ascending by row; their ids in [`Batch::tokens`] are ignored.
    pub fed: Vec<FedToken>,
}

/// A token that the submission before drew, and that stayed on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct FedToken {
    /// Its index in [`Batch::tokens`].
    pub row: usize,
    /// The draw's index in [`Batch::draws`] of that submission, below the rows of [`Sample::drawn`](super::Sample::drawn).
    /// If that submission had no such draw, any token is taken.
    pub draw: usize,
}

/// Consecutive tokens of one sequence.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Segment {
    /// Tokens in this segment; 0 is allowed, and copies the state.
    pub length: usize,
    /// Tokens of the sequence before this segment.
    pub position: usize,
    /// The slot that holds the state at `position`; `None` is the zero state that starts a sequence.
    pub slot_in: Option<Slot>,
    /// The slot that takes the state after the segment; it may be `slot_in`.
    pub slot_out: Slot,
    /// Positions inside the segment whose state is also stored, ascending. A chunk of the recurrence ends at each, so that a
    /// sequence resumed there repeats the same operations.
    pub checkpoints: Vec<StateCheckpoint>,
    /// The sequence's block table, from its first token to the last of this segment.
    pub blocks: Vec<Block>,
}

/// A copy of the state after the first `after` tokens of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct StateCheckpoint {
    /// Tokens of the segment, `1..=length`.
    pub after: usize,
    /// The slot that takes the copy.
    pub slot: Slot,
}

/// A row of the batch whose logits are requested.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct OutputRow {
    /// The token's index in [`Batch::tokens`].
    pub row: usize,
    /// A token whose logit is reported in addition to the candidates (the next token of a scored text).
    pub target: Option<u32>,
}

impl Batch {
    /// The smallest capacity that holds this batch.
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

    /// The index of each segment's first token in [`Batch::tokens`].
    pub fn starts(&self) -> impl Iterator<Item = usize> + '_ {
        self.segments.iter().scan(0, |at, segment| {
            let start = *at;
            *at += segment.length;
            Some(start)
        })
    }
}
