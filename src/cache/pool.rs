//! Numbered places with a count of their holders: which slots and blocks are free.
//!
//! It hands out numbers; what is in a place is the backend's business, and who holds it the holders'. A place that was
//! given back is not cleared: its next holder writes it before anything reads it.

use crate::backend::{Block, Slot};

/// A number that names a place in a pool.
pub trait Place: Copy + PartialEq + std::fmt::Debug {
    /// The place with this number.
    fn new(number: u32) -> Self;
    /// Its number.
    fn index(self) -> usize;
}

impl Place for Slot {
    fn new(number: u32) -> Self {
        Self(number)
    }
    fn index(self) -> usize {
        self.0 as usize
    }
}

impl Place for Block {
    fn new(number: u32) -> Self {
        Self(number)
    }
    fn index(self) -> usize {
        self.0 as usize
    }
}

/// The places of one pool, each with its number of holders; a place is free when nobody holds it.
#[derive(Debug)]
pub struct Counted<T> {
    holders: Vec<u32>,
    free: Vec<T>,
}

impl<T: Place> Counted<T> {
    /// A pool of `count` places, all free; low numbers are handed out first.
    #[must_use]
    pub fn new(count: usize) -> Self {
        let last = u32::try_from(count).unwrap_or(u32::MAX);
        Self {
            holders: vec![0; count],
            free: (0..last).rev().map(T::new).collect(),
        }
    }

    /// A free place, now held once.
    pub fn take(&mut self) -> Option<T> {
        let place = self.free.pop()?;
        self.holders[place.index()] = 1;
        Some(place)
    }

    /// One holder more.
    pub fn retain(&mut self, place: T) {
        debug_assert!(self.holders[place.index()] > 0, "{place:?} is free");
        self.holders[place.index()] += 1;
    }

    /// One holder less; the last one frees the place.
    pub fn release(&mut self, place: T) {
        let holders = &mut self.holders[place.index()];
        debug_assert!(*holders > 0, "{place:?} is free already");
        *holders = holders.saturating_sub(1);
        if *holders == 0 {
            self.free.push(place);
        }
    }

    /// How many hold this place.
    #[must_use]
    pub fn holders(&self, place: T) -> u32 {
        self.holders[place.index()]
    }

    /// Places that nobody holds.
    #[must_use]
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// All places.
    #[must_use]
    pub fn len(&self) -> usize {
        self.holders.len()
    }

    /// Whether the pool has no place at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.holders.is_empty()
    }
}
