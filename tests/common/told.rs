//! An observer of the prefix cache that keeps what it is told, and checks that each call follows from those before.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used
)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use kimi_linear::cache::{BlockHash, CacheObserver, HashedTokens};

/// Clones share what they were told.
#[derive(Clone)]
pub struct Told {
    root: BlockHash,
    stored: Arc<Mutex<BTreeMap<BlockHash, Stored>>>,
}

struct Stored {
    parent: Option<BlockHash>,
    children: usize,
}

impl Told {
    /// For a cache with this root, whose blocks it has not been told yet.
    pub fn new(root: BlockHash) -> Self {
        Self {
            root,
            stored: Arc::default(),
        }
    }

    /// The blocks that are stored, as far as it was told.
    pub fn blocks(&self) -> BTreeSet<BlockHash> {
        self.stored.lock().unwrap().keys().copied().collect()
    }

    /// The number of leading blocks of these that are stored.
    pub fn leading(&self, hashes: &[BlockHash]) -> usize {
        let stored = self.stored.lock().unwrap();
        let known = hashes.iter().take_while(|hash| stored.contains_key(hash));
        known.count()
    }
}

impl CacheObserver for Told {
    fn stored(&mut self, parent: Option<BlockHash>, block: BlockHash, tokens: &[u32]) {
        assert_eq!(block, parent.unwrap_or(self.root).then(tokens));
        let mut stored = self.stored.lock().unwrap();
        if let Some(parent) = parent {
            stored.get_mut(&parent).expect("parents first").children += 1;
        }
        let children = 0;
        let before = stored.insert(block, Stored { parent, children });
        assert!(before.is_none(), "stored twice");
    }

    fn removed(&mut self, block: BlockHash) {
        let mut stored = self.stored.lock().unwrap();
        let removed = stored.remove(&block).expect("stored before");
        assert_eq!(removed.children, 0, "children first");
        if let Some(parent) = removed.parent {
            stored.get_mut(&parent).expect("children first").children -= 1;
        }
    }
}

/// The blocks that checkpoints need, where each checkpoint is within one of the `known` sequences of tokens; `deepest` is the
/// position of the deepest one within a sequence, 0 if there is none.
pub fn backed<T: AsRef<[u32]>>(
    root: BlockHash,
    block_tokens: usize,
    known: impl IntoIterator<Item = T>,
    mut deepest: impl FnMut(&[u32]) -> usize,
) -> BTreeSet<BlockHash> {
    let mut backed = BTreeSet::new();
    for tokens in known {
        let hashed = HashedTokens::new(root, block_tokens, tokens.as_ref());
        backed.extend(hashed.prefix(deepest(&hashed)).hashes);
    }
    backed
}
