//! Checks a batch against the step's capacity and the pools, before any of it runs.

use std::collections::HashSet;
use std::fmt::Display;

use crate::backend::{
    Batch, Capacity, DrawCapacity, LatentLayout, Result, Sample, StateLayout, Tensor,
};
use crate::error::BackendError;

/// What a program's operations require of its batches.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Demands {
    /// Rows of the embedding.
    pub(crate) vocabulary: Option<usize>,
    /// The pool whose slots are read and written.
    pub(crate) states: Option<StateLayout>,
    /// The pool whose blocks are read and written.
    pub(crate) latents: Option<LatentLayout>,
    /// The operation that draws tokens.
    pub(crate) sample: Option<Sample>,
    /// The drawn tokens that the embedding reads.
    pub(crate) drawn: Option<Tensor>,
}

impl Demands {
    /// Maximum sizes of a batch's draws.
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    pub(crate) fn draws(&self) -> DrawCapacity {
        let sample = self.sample.as_ref();
        sample.map_or(DrawCapacity::NONE, |sample| sample.capacity)
    }

    /// Checks a batch before any of it runs.
    pub(crate) fn check(&self, capacity: &Capacity, batch: &Batch) -> Result<()> {
        self.check_sizes(capacity, batch)?;
        self.check_fed(batch)?;
        if let Some(vocabulary) = self.vocabulary {
            let mut fed = batch.fed.iter().map(|fed| fed.row).peekable();
            let outside = batch
                .tokens
                .iter()
                .enumerate()
                .filter(|(row, _)| fed.next_if_eq(row).is_none())
                .find(|(_, token)| **token as usize >= vocabulary);
            if let Some((position, &token)) = outside {
                return Err(BackendError::TokenOutOfRange {
                    token,
                    position,
                    last: vocabulary.saturating_sub(1),
                });
            }
        }
        if let Some(sample) = &self.sample {
            check_draws(sample, batch)?;
        }
        if let Some(layout) = &self.states {
            check_slots(layout, batch)?;
        }
        if let Some(layout) = &self.latents {
            check_blocks(layout, batch)?;
        }
        Ok(())
    }

    /// Fed tokens must be tokens of the batch, and drawn ones that the embedding reads.
    fn check_fed(&self, batch: &Batch) -> Result<()> {
        if self.vocabulary.is_none() {
            // No operation reads tokens.
            return Ok(());
        }
        let tokens = batch.tokens.len();
        let kept = self.drawn.map_or(0, |drawn| drawn.capacity);
        for fed in &batch.fed {
            if fed.row >= tokens {
                return wrong("the row of a fed token", format!("below {tokens}"), fed.row);
            }
            if fed.draw >= kept {
                return wrong("the draw of a fed token", format!("below {kept}"), fed.draw);
            }
        }
        if !batch.fed.is_sorted_by(|a, b| a.row < b.row) {
            return wrong("the order of fed tokens", "ascending", "not");
        }
        Ok(())
    }

    fn check_sizes(&self, capacity: &Capacity, batch: &Batch) -> Result<()> {
        let total: usize = batch.segments.iter().map(|segment| segment.length).sum();
        if total != batch.tokens.len() {
            return wrong("the sum of segment lengths", batch.tokens.len(), total);
        }
        if let Some((what, most, found)) = batch.size().beyond(capacity) {
            return wrong(
                format!("the number of {what}"),
                format!("at most {most}"),
                found,
            );
        }
        let ascending = batch
            .outputs
            .windows(2)
            .all(|pair| pair[0].row < pair[1].row);
        if !ascending {
            return wrong("the order of output rows", "ascending", "not");
        }
        for output in &batch.outputs {
            if output.row >= total {
                return wrong("an output row", format!("below {total}"), output.row);
            }
            if let (Some(target), Some(vocabulary)) = (output.target, self.vocabulary)
                && target as usize >= vocabulary
            {
                let last = vocabulary.saturating_sub(1);
                return Err(BackendError::TokenOutOfRange {
                    token: target,
                    position: output.row,
                    last,
                });
            }
        }
        Ok(())
    }
}

/// Draws must fit the step's capacity, and each its row.
fn check_draws(sample: &Sample, batch: &Batch) -> Result<()> {
    let size = DrawCapacity::of(&batch.draws);
    if let Some((what, most, found)) = sample.capacity.beyond(&size) {
        return wrong(
            format!("the number of {what}"),
            format!("at most {most}"),
            found,
        );
    }
    let (outputs, vocabulary) = (batch.outputs.len(), sample.logits.width);
    let mut draws = batch.draws.iter();
    draws.try_for_each(|draw| draw.check(outputs, vocabulary))
}

fn wrong<T>(what: impl Into<String>, expected: impl Display, found: impl Display) -> Result<T> {
    Err(BackendError::Batch {
        what: what.into(),
        expected: expected.to_string(),
        found: found.to_string(),
    })
}

/// Slots must exist. A slot that one segment writes may not be read or written by another.
fn check_slots(layout: &StateLayout, batch: &Batch) -> Result<()> {
    let mut written = HashSet::new();
    for (i, segment) in batch.segments.iter().enumerate() {
        let mut last = 0;
        for checkpoint in &segment.checkpoints {
            if checkpoint.after <= last || checkpoint.after > segment.length {
                let expected = format!("ascending, within 1..={}", segment.length);
                return wrong(
                    format!("a checkpoint of segment {i}"),
                    expected,
                    checkpoint.after,
                );
            }
            last = checkpoint.after;
        }
        let outs = segment
            .checkpoints
            .iter()
            .map(|checkpoint| checkpoint.slot)
            .chain([segment.slot_out]);
        for slot in outs.clone().chain(segment.slot_in) {
            if slot.0 as usize >= layout.slots {
                return wrong(
                    format!("a slot of segment {i}"),
                    format!("below {}", layout.slots),
                    slot.0,
                );
            }
        }
        for slot in outs {
            if !written.insert(slot) {
                return wrong(
                    format!("slot {} of segment {i}", slot.0),
                    "written once",
                    "written twice",
                );
            }
        }
    }
    for (i, segment) in batch.segments.iter().enumerate() {
        let Some(slot) = segment.slot_in else {
            continue;
        };
        // A segment's own checkpoints are among the written slots, and none of them is its `slot_out`.
        if written.contains(&slot) && segment.slot_out != slot {
            return wrong(
                format!("slot {} read by segment {i}", slot.0),
                "written by no other segment",
                "written too",
            );
        }
    }
    Ok(())
}

/// Block tables must cover their sequences. A block that one segment writes may not be read or written by another.
fn check_blocks(layout: &LatentLayout, batch: &Batch) -> Result<()> {
    let mut written = HashSet::new();
    for (i, segment) in batch.segments.iter().enumerate() {
        let Some(end) = segment.position.checked_add(segment.length) else {
            return wrong(
                format!("the end of segment {i}"),
                "a position that fits in memory",
                "beyond",
            );
        };
        let needed = end.div_ceil(layout.block_tokens);
        if segment.blocks.len() < needed {
            return wrong(
                format!("the block table of segment {i}"),
                format!("{needed} or more"),
                segment.blocks.len(),
            );
        }
        for block in &segment.blocks {
            if block.0 as usize >= layout.blocks {
                return wrong(
                    format!("a block of segment {i}"),
                    format!("below {}", layout.blocks),
                    block.0,
                );
            }
        }
        if segment.length > 0 {
            for block in &segment.blocks[segment.position / layout.block_tokens..needed] {
                if !written.insert(*block) {
                    return wrong(
                        format!("block {} of segment {i}", block.0),
                        "written once",
                        "written twice",
                    );
                }
            }
        }
    }
    for (i, segment) in batch.segments.iter().enumerate() {
        let kept = segment.position / layout.block_tokens;
        if let Some(block) = segment
            .blocks
            .iter()
            .take(kept)
            .find(|block| written.contains(block))
        {
            return wrong(
                format!("block {} read by segment {i}", block.0),
                "written by no other segment",
                "written too",
            );
        }
    }
    Ok(())
}
