//! Checks that tensors, slots and blocks that are read or written from the host exist, and that written values fit them.

use crate::backend::{
    Block, Element, LatentPool, LatentRecord, Result, Slot, StatePool, StateRecord, Tensor,
    TensorValues,
};
use crate::error::BackendError;

impl Tensor {
    /// Checks values that will be written over the first rows.
    pub(crate) fn check_values(&self, values: &TensorValues) -> Result<()> {
        let most = self.capacity * self.width;
        let (len, kind, fits) = match values {
            TensorValues::F32(values) => (values.len(), "F32", self.element != Element::Index),
            TensorValues::Index(values) => (values.len(), "Index", self.element == Element::Index),
        };
        if fits && len <= most {
            return Ok(());
        }
        Err(BackendError::Shape {
            operation: "write_tensor",
            what: "the values",
            expected: format!("at most {most} elements of {:?}", self.element),
            found: format!("{len} of {kind}"),
        })
    }

    /// Checks that the tensor has this number of rows.
    pub(crate) fn check_rows(&self, rows: usize) -> Result<()> {
        if rows <= self.capacity {
            return Ok(());
        }
        Err(BackendError::Shape {
            operation: "read_tensor",
            what: "the number of rows",
            expected: format!("at most {}", self.capacity),
            found: rows.to_string(),
        })
    }
}

impl StatePool {
    /// Checks that a layer of a slot exists.
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
        let what = "the number of convolution state elements";
        equal(
            "state",
            what,
            layout.conv_state_len(),
            record.conv_state.len(),
        )
    }
}

impl LatentPool {
    /// Checks that this number of rows exists in a layer of a block.
    pub(crate) fn check_rows(&self, layer: usize, block: Block, tokens: usize) -> Result<()> {
        let layout = &self.layout;
        within("latent", "the layer", layer, layout.layers)?;
        within("latent", "the block", block.0 as usize, layout.blocks)?;
        let what = "the number of tokens";
        within("latent", what, tokens, layout.block_tokens + 1)
    }

    /// Checks a record's shape; returns its number of rows.
    pub(crate) fn check_record(&self, record: &LatentRecord) -> Result<usize> {
        let layout = &self.layout;
        let shape = |latent, rope| format!("{latent} + {rope}");
        equal(
            "latent",
            "the width of a row",
            shape(layout.latent, layout.rope),
            shape(record.latent, record.rope),
        )?;
        let row = record.row_bytes().max(1);
        let what = "the remainder of its bytes by a row";
        equal("latent", what, 0, record.rows.len() % row)?;
        Ok(record.rows.len() / row)
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
