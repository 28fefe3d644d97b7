//! States and latents on their way in or out: whether the place is there, and whether the record fits it.

use crate::backend::{Block, LatentPool, LatentRecord, Result, Slot, StatePool, StateRecord};
use crate::error::BackendError;

impl StatePool {
    /// Checks that a layer of a slot is there.
    pub(crate) fn check_slot(&self, layer: usize, slot: Slot) -> Result<()> {
        within("state", "the layer", layer, self.layout.layers)?;
        within("state", "the slot", slot.0 as usize, self.layout.slots)
    }

    /// Checks a record's shape.
    pub(crate) fn check_record(&self, record: &StateRecord) -> Result<()> {
        let layout = &self.layout;
        let shape = |heads, key, value| format!("[{heads}, {key}, {value}]");
        equal(
            "state",
            "the shape",
            shape(layout.value_heads, layout.key_width, layout.value_width),
            shape(record.heads, record.key_width, record.value_width),
        )?;
        let what = "the number of elements";
        equal("state", what, layout.state_len(), record.state.len())?;
        let what = "the number of channels";
        equal("state", what, layout.channels(), record.channels)?;
        let what = "the number of tail elements";
        equal("state", what, layout.tail_len(), record.tail.len())
    }
}

impl LatentPool {
    /// Checks that so many rows of a layer of a block are there.
    pub(crate) fn check_rows(&self, layer: usize, block: Block, tokens: usize) -> Result<()> {
        let layout = &self.layout;
        within("latent", "the layer", layer, layout.layers)?;
        within("latent", "the block", block.0 as usize, layout.blocks)?;
        let what = "the number of tokens";
        within("latent", what, tokens, layout.block_tokens + 1)
    }

    /// Checks a record's shape; returns its rows.
    pub(crate) fn check_record(&self, record: &LatentRecord) -> Result<usize> {
        let layout = &self.layout;
        let shape = |latent, rope| format!("{latent} + {rope}");
        equal(
            "latent",
            "the width of a row",
            shape(layout.latent, layout.rope),
            shape(record.latent, record.rope),
        )?;
        let width = layout.width().max(1);
        let what = "the remainder of its length by a row";
        equal("latent", what, 0, record.rows.len() % width)?;
        Ok(record.rows.len() / width)
    }
}

fn within(what: &'static str, property: &'static str, found: usize, limit: usize) -> Result<()> {
    if found < limit {
        return Ok(());
    }
    Err(BackendError::Record {
        what,
        property,
        expected: format!("below {limit}"),
        found: found.to_string(),
    })
}

fn equal<T: PartialEq + ToString>(
    what: &'static str,
    property: &'static str,
    expected: T,
    found: T,
) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(BackendError::Record {
        what,
        property,
        expected: expected.to_string(),
        found: found.to_string(),
    })
}
