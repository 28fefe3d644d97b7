//! The eviction order of one pool: an ordered index over what the prefix tree keeps there, so that finding the next victim
//! costs the logarithm of the tree's size.

use std::collections::{BTreeSet, HashMap};

use super::pool::{PoolIndex, PoolRef};

/// What the tree keeps in one pool, by slot or block. Entries that only the tree references are victims, ordered by `O`.
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
    /// Adds the item `id`, which is kept in `held`.
    pub(super) fn insert(&mut self, held: &PoolRef<T>, id: I, order: O) {
        self.kept.entry(held.get()).or_default().push(id);
        if held.is_idle() {
            self.idle.insert((order, id));
        }
    }

    /// Removes the item `id`, which was kept in `entry`.
    pub(super) fn remove(&mut self, entry: T, id: I, order: O) {
        self.idle.remove(&(order, id));
        if let Some(kept) = self.kept.get_mut(&entry) {
            kept.retain(|other| *other != id);
            if kept.is_empty() {
                self.kept.remove(&entry);
            }
        }
    }

    /// What was kept in `from` is in `to`, where nothing was kept.
    pub(super) fn relocate(&mut self, from: T, to: T) {
        if let Some(kept) = self.kept.remove(&from) {
            self.kept.insert(to, kept);
        }
    }

    /// Updates the order of an item.
    pub(super) fn reorder(&mut self, id: I, from: O, to: O) {
        if self.idle.remove(&(from, id)) {
            self.idle.insert((to, id));
        }
    }

    /// Adds the items of `entry` to the victims if only the tree references it now, and removes them otherwise.
    pub(super) fn set_idle(&mut self, entry: T, idle: bool, order: impl Fn(I) -> Option<O>) {
        for id in self.kept.get(&entry).into_iter().flatten() {
            if let Some(order) = order(*id) {
                if idle {
                    self.idle.insert((order, *id));
                } else {
                    self.idle.remove(&(order, *id));
                }
            }
        }
    }

    /// The next victim.
    pub(super) fn first(&self) -> Option<I> {
        self.idle.first().map(|(_, id)| *id)
    }

    /// Number of slots or blocks that the tree keeps something in.
    pub(super) fn entries(&self) -> usize {
        self.kept.len()
    }
}
