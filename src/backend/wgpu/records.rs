//! Words of the device as the host's records.

use crate::backend::{Element, Orientation, StateLayout, StateRecord, Tensor, TensorValues};

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
