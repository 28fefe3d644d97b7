//! One cluster's prefix cache: its blocks, with eviction of the least recently used.
//!
//! A prompt continues from the longest run of its first blocks that are all cached. With a hybrid model, KDA states can be
//! reused only at the exact token of a checkpoint: the replay assumes one at every block's end; with an engine that stores
//! fewer, hits are shorter.

use std::collections::{HashMap, VecDeque};

/// The cached blocks.
#[derive(Debug)]
pub(super) struct PrefixCache {
    /// Maximum number of blocks; `None` for no limit.
    capacity: Option<usize>,
    /// The last use of each, as a count of uses.
    used: HashMap<u64, u64>,
    /// Uses in order; only a block's last one counts.
    order: VecDeque<(u64, u64)>,
    clock: u64,
}

impl PrefixCache {
    pub(super) fn new(capacity: Option<usize>) -> Self {
        Self {
            capacity,
            used: HashMap::new(),
            order: VecDeque::new(),
            clock: 0,
        }
    }

    /// Number of a prompt's first blocks that are cached.
    pub(super) fn known(&self, blocks: &[u64]) -> u32 {
        blocks
            .iter()
            .take_while(|block| self.used.contains_key(block))
            .count() as u32
    }

    /// Inserts a prompt's blocks, or updates their last use. The first blocks count as used last, because later ones are
    /// useless without them.
    pub(super) fn insert(&mut self, blocks: &[u64]) {
        for block in blocks.iter().rev() {
            self.clock += 1;
            self.used.insert(*block, self.clock);
            if self.capacity.is_some() {
                self.order.push_back((*block, self.clock));
            }
        }
        let Some(capacity) = self.capacity else {
            return;
        };
        while self.used.len() > capacity {
            let Some((block, use_)) = self.order.pop_front() else {
                return;
            };
            if self.used.get(&block) == Some(&use_) {
                self.used.remove(&block);
            }
        }
        if self.order.len() > 4 * self.used.len() + 1024 {
            let used = &self.used;
            self.order
                .retain(|(block, use_)| used.get(block) == Some(use_));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_prefix_ends_at_the_first_gap_and_its_end_is_given_up_first() {
        let mut cache = PrefixCache::new(Some(4));
        cache.insert(&[1, 2, 3]);
        assert_eq!(cache.known(&[1, 2, 9, 3]), 2);
        cache.insert(&[7, 8]);
        assert_eq!(cache.known(&[1, 2, 3]), 2);
        cache.insert(&[1]);
        cache.insert(&[5, 6]);
        assert_eq!((cache.known(&[1, 2]), cache.known(&[7])), (1, 1));
    }

    proptest! {
        #[test]
        fn it_agrees_with_a_list_kept_in_order(
            prompts in prop::collection::vec(prop::collection::vec(0u64..30, 1..6), 1..400),
            capacity in 1usize..20,
        ) {
            let mut cache = PrefixCache::new(Some(capacity));
            let mut list: Vec<u64> = Vec::new();
            for prompt in prompts {
                let known = prompt.iter().take_while(|block| list.contains(block)).count() as u32;
                prop_assert_eq!(cache.known(&prompt), known);
                cache.insert(&prompt);
                for block in prompt.iter().rev() {
                    list.retain(|other| other != block);
                    list.push(*block);
                }
                let excess = list.len().saturating_sub(capacity);
                list.drain(..excess);
                prop_assert!(cache.used.len() <= capacity);
                prop_assert!(cache.order.len() <= 4 * capacity + 1024 + 6);
            }
        }
    }
}
