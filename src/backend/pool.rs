//! The two pools: slots of KDA states, which have a fixed size, and blocks of MLA latents, of which a sequence has a growing
//! number.
//!
//! A pool is numbered memory. The cache assigns slots and blocks to sequences, not the backend.

use crate::config::Dtype;

/// A slot of a [`StatePool`]: the recurrent matrices and convolution states of all KDA layers of one sequence.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct Slot(pub u32);

/// One block of a [`LatentPool`]: `block_tokens` consecutive tokens of one sequence, in every MLA layer.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct Block(pub u32);

/// What one slot holds, a layer at a time: a state of `[value_heads, key_width, value_width]` and a convolution state
/// of `[channels, taps - 1]`, oldest input first, both f32. Heads are this rank's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct StateLayout {
    /// KDA layers.
    pub layers: usize,
    /// Heads of queries and keys. Value head `h` reads key head `h / (value_heads / key_heads)`.
    pub key_heads: usize,
    /// Heads of values, gates and states.
    pub value_heads: usize,
    /// Width K of a key.
    pub key_width: usize,
    /// Width V of a value.
    pub value_width: usize,
    /// Taps of the short convolution.
    pub taps: usize,
    /// Slots in the pool.
    pub slots: usize,
}

impl StateLayout {
    /// Channels of the convolution: queries, keys and values side by side.
    #[must_use]
    pub fn channels(&self) -> usize {
        2 * self.key_heads * self.key_width + self.value_heads * self.value_width
    }

    /// Elements of one layer's recurrent state.
    #[must_use]
    pub fn state_len(&self) -> usize {
        self.value_heads * self.key_width * self.value_width
    }

    /// Elements of one layer's convolution state.
    #[must_use]
    pub fn conv_state_len(&self) -> usize {
        self.channels() * (self.taps - 1)
    }

    /// Bytes of the whole pool.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        4 * (self.layers * self.slots) as u64 * (self.state_len() + self.conv_state_len()) as u64
    }
}

/// A pool of KDA states.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct StatePool {
    /// The backend's number for it.
    pub id: usize,
    /// Its shape.
    pub layout: StateLayout,
}

/// The shape of a latent pool: `[layers, blocks, block_tokens, latent + rope]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LatentLayout {
    /// MLA layers.
    pub layers: usize,
    /// Width of the normalised latent c'.
    pub latent: usize,
    /// Width of the key part shared by all heads, k_pe.
    pub rope: usize,
    /// Tokens per block.
    pub block_tokens: usize,
    /// Blocks in the pool.
    pub blocks: usize,
    /// The dtype that rows are cached in.
    pub dtype: Dtype,
}

impl LatentLayout {
    /// Elements of one token's row.
    #[must_use]
    pub fn width(&self) -> usize {
        self.latent + self.rope
    }

    /// Elements of the whole pool.
    #[must_use]
    pub fn len(&self) -> usize {
        self.layers * self.blocks * self.block_tokens * self.width()
    }

    /// Bytes of the whole pool.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        (self.len() * self.dtype.size()) as u64
    }

    /// Whether the pool is empty (for a model without MLA layers).
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A pool of MLA latents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LatentPool {
    /// The backend's number for it.
    pub id: usize,
    /// Its shape.
    pub layout: LatentLayout,
}

impl StatePool {
    /// The same pool with another number of slots.
    pub(crate) fn resized(mut self, slots: usize) -> Self {
        self.layout.slots = slots;
        self
    }
}

impl LatentPool {
    /// The same pool with another number of blocks.
    pub(crate) fn resized(mut self, blocks: usize) -> Self {
        self.layout.blocks = blocks;
        self
    }
}
