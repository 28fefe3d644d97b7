//! States and latents on their way out of a device or into one, a layer at a time.
//!
//! Only the numbers and what they mean; headers, checksums and files are the cache's.

use super::StateLayout;

/// Which index of a stored state runs fastest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Orientation {
    /// `[heads, K, V]`: the value index runs fastest.
    KeyValue,
    /// `[heads, V, K]`: the key index runs fastest.
    ValueKey,
}

/// One KDA layer of one slot.
#[derive(Clone, Debug, PartialEq)]
pub struct StateRecord {
    /// How `state` is laid out.
    pub orientation: Orientation,
    /// Value heads.
    pub heads: usize,
    /// Width K of a key.
    pub key_width: usize,
    /// Width V of a value.
    pub value_width: usize,
    /// The recurrent matrices, f32.
    pub state: Vec<f32>,
    /// Channels of the convolution state.
    pub channels: usize,
    /// The convolution state, `[channels, taps - 1]`, oldest input first, f32.
    pub conv_state: Vec<f32>,
}

/// Consecutive latent rows of one MLA layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LatentRecord {
    /// Width of the normalised latent c'.
    pub latent: usize,
    /// Width of k_pe.
    pub rope: usize,
    /// `[tokens, latent + rope]`, widened to f32.
    pub rows: Vec<f32>,
}

impl StateRecord {
    /// A state `[heads, K, V]` and a convolution state `[channels, taps - 1]` of a pool with this layout.
    pub(crate) fn new(layout: &StateLayout, state: Vec<f32>, conv_state: Vec<f32>) -> Self {
        Self {
            orientation: Orientation::KeyValue,
            heads: layout.value_heads,
            key_width: layout.key_width,
            value_width: layout.value_width,
            state,
            channels: layout.channels(),
            conv_state,
        }
    }

    /// The recurrent matrices as `[heads, K, V]`, whatever their orientation.
    #[must_use]
    pub fn key_value(&self) -> std::borrow::Cow<'_, [f32]> {
        let (k, v) = (self.key_width, self.value_width);
        if self.orientation == Orientation::KeyValue {
            return std::borrow::Cow::Borrowed(&self.state);
        }
        let transposed = (0..self.state.len()).map(|i| {
            let (head, d, e) = (i / (k * v), i / v % k, i % v);
            self.state[(head * v + e) * k + d]
        });
        std::borrow::Cow::Owned(transposed.collect())
    }
}
