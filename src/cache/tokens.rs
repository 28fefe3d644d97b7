//! Tokens with the hashes of their blocks, each computed once.

use std::ops::Deref;

use super::block_hash::BlockHash;

/// A sequence's tokens, and the key of each whole block of them.
#[derive(Clone, Debug)]
pub struct HashedTokens {
    tokens: Vec<u32>,
    root: BlockHash,
    /// One per whole block.
    hashes: Vec<BlockHash>,
    block_tokens: usize,
}

impl HashedTokens {
    /// Hashes `tokens`, in blocks of `block_tokens`.
    #[must_use]
    pub fn new(root: BlockHash, block_tokens: usize, tokens: &[u32]) -> Self {
        let mut hashed = Self {
            tokens: tokens.to_vec(),
            root,
            hashes: Vec::with_capacity(tokens.len() / block_tokens),
            block_tokens,
        };
        hashed.hash();
        hashed
    }

    /// Appends a token.
    pub fn push(&mut self, token: u32) {
        self.tokens.push(token);
        self.hash();
    }

    /// Computes the hashes of blocks that have become whole.
    fn hash(&mut self) {
        let done = self.hashes.len() * self.block_tokens;
        for block in self.tokens[done..].chunks_exact(self.block_tokens) {
            let parent = self.hashes.last().copied().unwrap_or(self.root);
            self.hashes.push(parent.then(block));
        }
    }

    /// The first `end` tokens.
    #[must_use]
    pub fn prefix(&self, end: usize) -> Prefix<'_> {
        Prefix {
            tokens: &self.tokens[..end],
            hashes: &self.hashes[..end / self.block_tokens],
        }
    }

    /// All tokens.
    #[must_use]
    pub fn whole(&self) -> Prefix<'_> {
        self.prefix(self.tokens.len())
    }
}

impl Deref for HashedTokens {
    type Target = [u32];

    fn deref(&self) -> &[u32] {
        &self.tokens
    }
}

/// The first tokens of a sequence, with the key of each whole block of them.
#[derive(Clone, Copy, Debug)]
pub struct Prefix<'a> {
    /// The tokens.
    pub tokens: &'a [u32],
    /// One per whole block.
    pub hashes: &'a [BlockHash],
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{LatentLayout, StateLayout};
    use crate::checkpoint::Fingerprint;
    use crate::config::Dtype;

    #[test]
    fn keys_kept_while_tokens_come_are_those_of_all_at_once() {
        let states = StateLayout {
            layers: 1,
            key_heads: 1,
            value_heads: 1,
            key_width: 1,
            value_width: 1,
            taps: 4,
            slots: 1,
        };
        let latents = LatentLayout {
            layers: 1,
            latent: 1,
            rope: 1,
            block_tokens: 4,
            blocks: 1,
            dtype: Dtype::F32,
        };
        let root = BlockHash::root(Fingerprint(1), &states, &latents);
        let tokens: Vec<u32> = (0..23).collect();
        let whole = HashedTokens::new(root, 4, &tokens);
        let mut grown = HashedTokens::new(root, 4, &tokens[..6]);
        tokens[6..].iter().for_each(|token| grown.push(*token));
        assert_eq!(grown.hashes, whole.hashes);
        assert_eq!(whole.hashes.len(), 5);
        assert_eq!(
            whole.hashes[1],
            root.then(&[0, 1, 2, 3]).then(&[4, 5, 6, 7])
        );
        assert_eq!(whole.prefix(11).hashes, &whole.hashes[..2]);
    }
}
