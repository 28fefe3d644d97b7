//! Words of the device as the host's records, and the checks on records that come in.

use crate::backend::{
    Block, Element, LatentLayout, LatentPool, LatentRecord, Orientation, Result, Slot, StateLayout,
    StatePool, StateRecord, Tensor, TensorValues,
};
use crate::error::BackendError;

/// Words as the f32 that they are.
pub(super) fn floats(words: Vec<u32>) -> Vec<f32> {
    bytemuck::cast_vec(words)
}

/// Words as values of a tensor.
pub(super) fn values(tensor: Tensor, words: Vec<u32>) -> TensorValues {
    match tensor.element {
        Element::Index => TensorValues::Index(words),
        Element::Activation | Element::F32 => TensorValues::F32(floats(words)),
    }
}

/// A state, then its tail.
pub(super) fn state(layout: &StateLayout, words: Vec<u32>) -> StateRecord {
    let mut state = floats(words);
    let tail = state.split_off(layout.state_len());
    StateRecord {
        orientation: Orientation::KeyValue,
        heads: layout.value_heads,
        key_width: layout.key_width,
        value_width: layout.value_width,
        state,
        channels: layout.channels(),
        tail,
    }
}

pub(super) fn check_slot(pool: &StatePool, layer: usize, slot: Slot) -> Result<()> {
    within("state", "the layer", layer, pool.layout.layers)?;
    within("state", "the slot", slot.0 as usize, pool.layout.slots)
}

pub(super) fn check_state(layout: &StateLayout, record: &StateRecord) -> Result<()> {
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

pub(super) fn check_block(
    pool: &LatentPool,
    layer: usize,
    block: Block,
    tokens: usize,
) -> Result<()> {
    let layout = &pool.layout;
    within("latent", "the layer", layer, layout.layers)?;
    within("latent", "the block", block.0 as usize, layout.blocks)?;
    let what = "the number of tokens";
    within("latent", what, tokens, layout.block_tokens + 1)
}

/// Checks a record's shape; returns its rows.
pub(super) fn check_latents(layout: &LatentLayout, record: &LatentRecord) -> Result<usize> {
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
