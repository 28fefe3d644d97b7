//! One cluster's prefix cache: which blocks it has, the least recently used ones given up first.
//!
//! A prompt goes on from the longest run of its first blocks that are all there. A hybrid's KDA states can be taken up at the exact
//! token of a checkpoint only: the replay assumes one at every block's end; where an engine keeps fewer, hits are shorter.

use std::collections::{HashMap, VecDeque};

/// The blocks that are there.
#[derive(Debug)]
pub(super) struct PrefixCache {
    /// Blocks that it holds at the most; `None` for any number.
    capacity: Option<usize>,
    /// When each was last used, as a count of uses.
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

    /// How many of a prompt's first blocks are there.
    pub(super) fn known(&self, blocks: &[u64]) -> u32 {
        blocks
            .iter()
            .take_while(|block| self.used.contains_key(block))
            .count() as u32
    }

    /// Puts a prompt's blocks in, or notes that they were used. The first ones count as used last, since later ones are worth
    /// nothing without them.
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
