//! Numbered places with a count of their holders: which slots and blocks are free.
//!
//! It hands out numbers; what is in a place is the backend's business. Whoever holds a place holds a [`PoolRef`], which gives
//! it back when it is dropped: no error path can leak one. A place that was given back is not cleared: its next holder writes
//! it before anything reads it.

use std::fmt::Debug;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::backend::{Block, Slot};

/// A number that names a place in a pool.
pub trait PoolIndex: Copy + Eq + Hash + Debug {
    /// The place with this number.
    fn new(number: u32) -> Self;
    /// Its number.
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

/// A held slot.
pub type SlotRef = PoolRef<Slot>;

/// A held block.
pub type BlockRef = PoolRef<Block>;

/// The holders of one place.
#[derive(Clone, Copy, Debug, Default)]
struct Holders {
    all: u32,
    /// Those of them that are the prefix tree.
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
    /// Places that have become idle, or are so no longer, since this was asked last; each once.
    changed: Vec<T>,
}

impl<T: PoolIndex> Shared<T> {
    /// So many holders more or fewer; the last one frees the place.
    fn change(&mut self, place: T, all: i32, cached: i32) {
        let holders = &mut self.holders[place.index()];
        let was = holders.idle();
        holders.all = holders.all.saturating_add_signed(all);
        holders.cached = holders.cached.saturating_add_signed(cached);
        let is = holders.idle();
        if was != is {
            self.idle = if is { self.idle + 1 } else { self.idle - 1 };
            if !std::mem::replace(&mut holders.changed, true) {
                self.changed.push(place);
            }
        }
        if holders.all == 0 {
            self.free.push(place);
        }
    }
}

fn lock<T>(shared: &Mutex<Shared<T>>) -> MutexGuard<'_, Shared<T>> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The places of one pool, each with its number of holders; a place is free when nobody holds it.
#[derive(Debug)]
pub struct RefCountedPool<T>(Arc<Mutex<Shared<T>>>);

impl<T: PoolIndex> RefCountedPool<T> {
    /// A pool of `count` places, all free; low numbers are handed out first.
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

    /// A free place, now held once.
    #[must_use]
    pub fn take(&self) -> Option<PoolRef<T>> {
        let mut shared = lock(&self.0);
        let place = shared.free.pop()?;
        shared.change(place, 1, 0);
        Some(PoolRef {
            place,
            cached: false,
            pool: Arc::clone(&self.0),
        })
    }

    /// Number of places that nobody holds.
    #[must_use]
    pub fn free(&self) -> usize {
        lock(&self.0).free.len()
    }

    /// Number of places that the prefix tree alone holds.
    #[must_use]
    pub fn idle(&self) -> usize {
        lock(&self.0).idle
    }

    /// Number of all places.
    #[must_use]
    pub fn len(&self) -> usize {
        lock(&self.0).holders.len()
    }

    /// Whether the pool has no place at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Places that may have become idle, or may be so no longer, since this was asked last; and whether they are.
    pub(super) fn take_changed(&self) -> Vec<(T, bool)> {
        let mut shared = lock(&self.0);
        let changed = std::mem::take(&mut shared.changed);
        let now = changed.into_iter().map(|place| {
            let holders = &mut shared.holders[place.index()];
            holders.changed = false;
            (place, holders.idle())
        });
        now.collect()
    }
}

/// A place that is held. A clone is one holder more; dropping it is one fewer, and the last one frees the place.
#[derive(Debug)]
pub struct PoolRef<T: PoolIndex> {
    place: T,
    cached: bool,
    pool: Arc<Mutex<Shared<T>>>,
}

impl<T: PoolIndex> PoolRef<T> {
    /// The place.
    #[must_use]
    pub fn get(&self) -> T {
        self.place
    }

    /// A hold of the prefix tree's: a place that has no others is idle, and may be evicted.
    pub(super) fn cached(&self) -> Self {
        self.hold(true)
    }

    /// Whether the prefix tree alone holds it.
    pub(super) fn is_idle(&self) -> bool {
        lock(&self.pool).holders[self.place.index()].idle()
    }

    fn hold(&self, cached: bool) -> Self {
        lock(&self.pool).change(self.place, 1, i32::from(cached));
        Self {
            place: self.place,
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
        lock(&self.pool).change(self.place, -1, -i32::from(self.cached));
    }
}
