//! Reference-counted slots and blocks: which entries of a pool are free.
//!
//! A pool hands out indices; the contents belong to the backend. An entry in use is held through a [`PoolRef`], which frees it
//! when dropped, so that no error path can leak one. A freed entry is not cleared: its next owner writes it before it is read.

use std::fmt::Debug;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::backend::{Block, Slot};

/// The index of an entry in a pool: a slot or a block.
pub trait PoolIndex: Copy + Eq + Hash + Debug {
    /// The entry with this index.
    fn new(number: u32) -> Self;
    /// Its index.
    fn index(self) -> usize;
}

impl PoolIndex for Slot {
    fn new(number: u32) -> Self {
        Self(number)
    }
    fn index(self) -> usize {
        self.0 as usize
    }
}

impl PoolIndex for Block {
    fn new(number: u32) -> Self {
        Self(number)
    }
    fn index(self) -> usize {
        self.0 as usize
    }
}

/// A slot in use.
pub type SlotRef = PoolRef<Slot>;

/// A block in use.
pub type BlockRef = PoolRef<Block>;

/// The reference counts of one entry.
#[derive(Clone, Copy, Debug, Default)]
struct Holders {
    all: u32,
    /// References of the prefix tree, included in `all`.
    cached: u32,
    /// Whether it is in [`Shared::changed`].
    changed: bool,
}

impl Holders {
    fn idle(self) -> bool {
        self.all > 0 && self.all == self.cached
    }
}

#[derive(Debug)]
struct Shared<T> {
    holders: Vec<Holders>,
    free: Vec<T>,
    idle: usize,
    /// Entries whose idle flag has changed since the last [`RefCountedPool::take_changed`], each once.
    changed: Vec<T>,
}

impl<T: PoolIndex> Shared<T> {
    /// Adds to both reference counts; at zero references the entry is free.
    fn change(&mut self, entry: T, all: i32, cached: i32) {
        let holders = &mut self.holders[entry.index()];
        let was = holders.idle();
        holders.all = holders.all.saturating_add_signed(all);
        holders.cached = holders.cached.saturating_add_signed(cached);
        let is = holders.idle();
        if was != is {
            self.idle = if is { self.idle + 1 } else { self.idle - 1 };
            if !std::mem::replace(&mut holders.changed, true) {
                self.changed.push(entry);
            }
        }
        if holders.all == 0 {
            self.free.push(entry);
        }
    }
}

fn lock<T>(shared: &Mutex<Shared<T>>) -> MutexGuard<'_, Shared<T>> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The entries of one pool with their reference counts; an entry without references is free.
#[derive(Debug)]
pub struct RefCountedPool<T>(Arc<Mutex<Shared<T>>>);

impl<T: PoolIndex> RefCountedPool<T> {
    /// A pool of `count` free entries; low indices are handed out first.
    #[must_use]
    pub fn new(count: usize) -> Self {
        let last = u32::try_from(count).unwrap_or(u32::MAX);
        Self(Arc::new(Mutex::new(Shared {
            holders: vec![Holders::default(); count],
            free: (0..last).rev().map(T::new).collect(),
            idle: 0,
            changed: Vec::new(),
        })))
    }

    /// Takes a free entry, which then has one reference; `None` if all are in use.
    #[must_use]
    pub fn take(&self) -> Option<PoolRef<T>> {
        let mut shared = lock(&self.0);
        let entry = shared.free.pop()?;
        shared.change(entry, 1, 0);
        Some(PoolRef {
            entry,
            cached: false,
            pool: Arc::clone(&self.0),
        })
    }

    /// Number of free entries.
    #[must_use]
    pub fn free(&self) -> usize {
        lock(&self.0).free.len()
    }

    /// Number of entries that only the prefix tree references.
    #[must_use]
    pub fn idle(&self) -> usize {
        lock(&self.0).idle
    }

    /// Number of entries, free or not.
    #[must_use]
    pub fn len(&self) -> usize {
        lock(&self.0).holders.len()
    }

    /// Whether the pool has no entries at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Entries whose idle flag may have changed since the last call, with the present flag.
    pub(super) fn take_changed(&self) -> Vec<(T, bool)> {
        let mut shared = lock(&self.0);
        let changed = std::mem::take(&mut shared.changed);
        let now = changed.into_iter().map(|entry| {
            let holders = &mut shared.holders[entry.index()];
            holders.changed = false;
            (entry, holders.idle())
        });
        now.collect()
    }
}

/// A reference to an entry. Cloning adds a reference, dropping removes one, and the last one frees the entry.
#[derive(Debug)]
pub struct PoolRef<T: PoolIndex> {
    entry: T,
    cached: bool,
    pool: Arc<Mutex<Shared<T>>>,
}

impl<T: PoolIndex> PoolRef<T> {
    /// The entry.
    #[must_use]
    pub fn get(&self) -> T {
        self.entry
    }

    /// A reference of the prefix tree. An entry with no other references is idle and may be evicted.
    pub(super) fn cached(&self) -> Self {
        self.hold(true)
    }

    /// Whether only the prefix tree references it.
    pub(super) fn is_idle(&self) -> bool {
        lock(&self.pool).holders[self.entry.index()].idle()
    }

    fn hold(&self, cached: bool) -> Self {
        lock(&self.pool).change(self.entry, 1, i32::from(cached));
        Self {
            entry: self.entry,
            cached,
            pool: Arc::clone(&self.pool),
        }
    }
}

impl<T: PoolIndex> Clone for PoolRef<T> {
    fn clone(&self) -> Self {
        self.hold(false)
    }
}

impl<T: PoolIndex> Drop for PoolRef<T> {
    fn drop(&mut self) {
        lock(&self.pool).change(self.entry, -1, -i32::from(self.cached));
    }
}
