//! The keys of cached blocks: a hash of the model, of the layout of its pools, and of the tokens up to the end of the block.

use xxhash_rust::xxh3::Xxh3;

use crate::backend::{LatentLayout, StateLayout};
use crate::checkpoint::Fingerprint;

/// The key of a block: a hash of its tokens and of its parent's key, and so of all tokens before it, the model and the layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash(u128);

impl BlockHash {
    /// The parent key of the first block of every sequence of one model and layout.
    #[must_use]
    pub fn root(model: Fingerprint, states: &StateLayout, latents: &LatentLayout) -> Self {
        let StateLayout {
            layers,
            key_heads,
            value_heads,
            key_width,
            value_width,
            taps,
            ..
        } = *states;
        let states = [layers, key_heads, value_heads, key_width, value_width, taps];
        let rows = [
            latents.layers,
            latents.latent,
            latents.rope,
            latents.block_tokens,
        ];
        let mut hash = Xxh3::new();
        hash.update(
            format!(
                "{model} states {states:?} latents {rows:?} {}",
                latents.dtype
            )
            .as_bytes(),
        );
        Self(hash.digest128())
    }

    /// The key of the block of `tokens` after this one.
    #[must_use]
    pub fn then(self, tokens: &[u32]) -> Self {
        let mut hash = Xxh3::new();
        hash.update(&self.0.to_le_bytes());
        hash.update(bytemuck::cast_slice(tokens));
        Self(hash.digest128())
    }
}
