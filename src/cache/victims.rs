//! What of the prefix tree may leave a pool, in the order in which it should: an ordered index, so that finding the next
//! victim costs the logarithm of the tree's size.

use std::collections::{BTreeSet, HashMap};

use super::pool::{PoolIndex, PoolRef};

/// The contents of one pool that the tree keeps, by their place. Those whose place nobody else holds are ordered by `O`.
#[derive(Debug)]
pub(super) struct Victims<T, I, O> {
    /// A block is kept as a whole one and by each checkpoint inside it.
    kept: HashMap<T, Vec<I>>,
    idle: BTreeSet<(O, I)>,
}

impl<T, I, O> Default for Victims<T, I, O> {
    fn default() -> Self {
        Self {
            kept: HashMap::new(),
            idle: BTreeSet::new(),
        }
    }
}

impl<T: PoolIndex, I: Copy + Ord, O: Ord> Victims<T, I, O> {
    /// Takes up what is kept in `held`.
    pub(super) fn insert(&mut self, held: &PoolRef<T>, id: I, order: O) {
        self.kept.entry(held.get()).or_default().push(id);
        if held.is_idle() {
            self.idle.insert((order, id));
        }
    }

    /// It is kept in `place` no longer.
    pub(super) fn remove(&mut self, place: T, id: I, order: O) {
        self.idle.remove(&(order, id));
        if let Some(kept) = self.kept.get_mut(&place) {
            kept.retain(|other| *other != id);
            if kept.is_empty() {
                self.kept.remove(&place);
            }
        }
    }

    /// Its order has changed.
    pub(super) fn reorder(&mut self, id: I, from: O, to: O) {
        if self.idle.remove(&(from, id)) {
            self.idle.insert((to, id));
        }
    }

    /// Somebody beside the tree holds `place` now, or nobody does any more.
    pub(super) fn set_idle(&mut self, place: T, idle: bool, order: impl Fn(I) -> Option<O>) {
        for id in self.kept.get(&place).into_iter().flatten() {
            if let Some(order) = order(*id) {
                if idle {
                    self.idle.insert((order, *id));
                } else {
                    self.idle.remove(&(order, *id));
                }
            }
        }
    }

    /// What should go first.
    pub(super) fn first(&self) -> Option<I> {
        self.idle.first().map(|(_, id)| *id)
    }

    /// Number of places that something is kept in.
    pub(super) fn places(&self) -> usize {
        self.kept.len()
    }
}
