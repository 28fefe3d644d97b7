//! Reference-counted slots and blocks: which entries of a pool are free.
//!
//! A pool hands out indices; the contents belong to the backend. An entry in use is held through a [`PoolRef`], which frees it
//! when dropped, so that no error path can leak one. A freed entry is not cleared: its next owner writes it before it is read.
//!
//! The size of a pool may change. Before it shrinks, what is held at its end moves to free places below, and all references follow:
//! they share the number of their place.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::hash::Hash;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU32, Ordering};
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
#[derive(Debug)]
struct Holders {
    /// The entry's index, which every reference to it shares; changed only while the pool is locked.
    place: Arc<AtomicU32>,
    all: u32,
    /// References of the prefix tree, included in `all`.
    cached: u32,
    /// Whether it is in [`Shared::changed`].
    changed: bool,
}

impl Holders {
    /// Of a free entry.
    fn new(index: u32) -> Self {
        Self {
            place: Arc::new(AtomicU32::new(index)),
            all: 0,
            cached: 0,
            changed: false,
        }
    }

    fn idle(&self) -> bool {
        self.all > 0 && self.all == self.cached
    }
}

#[derive(Debug)]
struct Shared<T> {
    holders: Vec<Holders>,
    /// Indices of free entries. The lowest is handed out first, so that little is to be moved before the pool shrinks.
    free: BTreeSet<u32>,
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
            self.free.insert(number(entry.index()));
        }
    }

    /// Exchanges an entry in use and a free one with all that is known of them: references follow.
    fn swap(&mut self, used: T, free: T) {
        self.holders.swap(used.index(), free.index());
        for entry in [used, free] {
            let place = &self.holders[entry.index()].place;
            place.store(number(entry.index()), Ordering::Relaxed);
        }
        self.free.remove(&number(free.index()));
        self.free.insert(number(used.index()));
        for entry in &mut self.changed {
            if *entry == used {
                *entry = free;
            } else if *entry == free {
                *entry = used;
            }
        }
    }
}

/// An index as references hold it; entries beyond it are never handed out.
fn number(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
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
        let pool = Self(Arc::new(Mutex::new(Shared {
            holders: Vec::new(),
            free: BTreeSet::new(),
            idle: 0,
            changed: Vec::new(),
        })));
        pool.grow(count);
        pool
    }

    /// Adds free entries until there are `count`.
    pub(super) fn grow(&self, count: usize) {
        let mut shared = lock(&self.0);
        let fresh = number(shared.holders.len())..number(count);
        shared.holders.extend(fresh.clone().map(Holders::new));
        shared.free.extend(fresh);
    }

    /// Entries in use from index `count` on, each with a free one below that it can move to, as far as there are some.
    pub(super) fn moves(&self, count: usize) -> Vec<(T, T)> {
        let shared = lock(&self.0);
        let high = (count..shared.holders.len()).filter(|index| shared.holders[*index].all > 0);
        let high = high.map(|index| T::new(number(index)));
        let low = shared.free.range(..number(count)).copied().map(T::new);
        high.zip(low).collect()
    }

    /// Gives the entry `from`, with all its references, the free place `to`.
    pub(super) fn relocate(&self, from: T, to: T) {
        lock(&self.0).swap(from, to);
    }

    /// Removes the entries from index `count` on. Returns whether they are removed: all of them must be free.
    pub(super) fn shrink(&self, count: usize) -> bool {
        let mut shared = lock(&self.0);
        if shared.holders.iter().skip(count).any(|it| it.all > 0) {
            return false;
        }
        shared.holders.truncate(count);
        shared.changed.retain(|entry| entry.index() < count);
        let count = number(count);
        shared.free.retain(|index| *index < count);
        true
    }

    /// Takes a free entry, which then has one reference; `None` if all are in use.
    #[must_use]
    pub fn take(&self) -> Option<PoolRef<T>> {
        let mut shared = lock(&self.0);
        let entry = T::new(shared.free.pop_first()?);
        shared.change(entry, 1, 0);
        Some(PoolRef {
            place: Arc::clone(&shared.holders[entry.index()].place),
            entry: PhantomData,
            cached: false,
            pool: Arc::clone(&self.0),
        })
    }

    /// Number of free entries.
    #[must_use]
    pub fn free(&self) -> usize {
        lock(&self.0).free.len()
    }

    /// Number of entries in use.
    pub(super) fn used(&self) -> usize {
        let shared = lock(&self.0);
        shared.holders.len() - shared.free.len()
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
    /// The entry's index, as long as it is held.
    place: Arc<AtomicU32>,
    entry: PhantomData<T>,
    cached: bool,
    pool: Arc<Mutex<Shared<T>>>,
}

impl<T: PoolIndex> PoolRef<T> {
    /// The entry. It may be another one after the pool's size has changed.
    #[must_use]
    pub fn get(&self) -> T {
        T::new(self.place.load(Ordering::Relaxed))
    }

    /// A reference of the prefix tree. An entry with no other references is idle and may be evicted.
    pub(super) fn cached(&self) -> Self {
        self.hold(true)
    }

    /// Whether only the prefix tree references it.
    pub(super) fn is_idle(&self) -> bool {
        let shared = lock(&self.pool);
        shared.holders[self.get().index()].idle()
    }

    fn hold(&self, cached: bool) -> Self {
        let mut shared = lock(&self.pool);
        shared.change(self.get(), 1, i32::from(cached));
        Self {
            place: Arc::clone(&self.place),
            entry: PhantomData,
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
        let mut shared = lock(&self.pool);
        shared.change(self.get(), -1, -i32::from(self.cached));
    }
}
