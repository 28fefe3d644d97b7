//! Several ranks of one model: who holds what, and how partial results meet.
//!
//! Operations see local heads and local experts, and the loader slices; so one model serves one rank and many.

use std::sync::{Arc, Barrier, Mutex, PoisonError};

/// One rank's part of the whole: heads, experts and vocabulary are cut into `ranks` equal ranges, in rank order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Shard {
    /// This rank, from 0.
    pub rank: usize,
    /// All ranks.
    pub ranks: usize,
}

impl Shard {
    /// The only rank there is.
    pub const WHOLE: Self = Self { rank: 0, ranks: 1 };

    /// This rank's part of `0..len`, or nothing where `len` is not a multiple of the ranks.
    #[must_use]
    pub fn range(&self, len: usize) -> Option<std::ops::Range<usize>> {
        let part = len / self.ranks;
        (part * self.ranks == len).then(|| self.rank * part..(self.rank + 1) * part)
    }
}

/// Communication between ranks. Every rank must make the same calls in the same order.
pub trait Collective: Send + Sync {
    /// This rank's part.
    fn shard(&self) -> Shard;

    /// Replaces `values` by the sum over ranks, added in rank order, so that every rank holds the same bits.
    fn all_reduce(&self, values: &mut [f32]);

    /// The ranks' values laid end to end, in rank order.
    fn all_gather(&self, values: &[f32]) -> Vec<f32>;
}

/// One rank by itself: every collective is the identity.
#[derive(Clone, Copy, Debug)]
pub struct Alone;

impl Collective for Alone {
    fn shard(&self) -> Shard {
        Shard::WHOLE
    }

    fn all_reduce(&self, _values: &mut [f32]) {}

    fn all_gather(&self, values: &[f32]) -> Vec<f32> {
        values.to_vec()
    }
}

/// Ranks that are threads of one process and meet in shared memory.
///
/// It exists so that sharding is held to the answers of the whole model on any machine; it brings no speed.
pub struct Threads {
    shard: Shard,
    meeting: Arc<Meeting>,
}

struct Meeting {
    barrier: Barrier,
    parts: Mutex<Vec<Vec<f32>>>,
}

impl Threads {
    /// One collective for each of `ranks` threads.
    #[must_use]
    pub fn new(ranks: usize) -> Vec<Self> {
        let meeting = Arc::new(Meeting {
            barrier: Barrier::new(ranks),
            parts: Mutex::new(vec![Vec::new(); ranks]),
        });
        (0..ranks)
            .map(|rank| Self {
                shard: Shard { rank, ranks },
                meeting: Arc::clone(&meeting),
            })
            .collect()
    }
}

impl Collective for Threads {
    fn shard(&self) -> Shard {
        self.shard
    }

    fn all_reduce(&self, values: &mut [f32]) {
        let parts = self.all_gather(values);
        let len = values.len();
        for (i, value) in values.iter_mut().enumerate() {
            *value = (0..self.shard.ranks)
                .map(|rank| parts[rank * len + i])
                .sum();
        }
    }

    fn all_gather(&self, values: &[f32]) -> Vec<f32> {
        let lock = || {
            self.meeting
                .parts
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
        };
        lock()[self.shard.rank] = values.to_vec();
        self.meeting.barrier.wait();
        let gathered = lock().concat();
        // Nobody may write the next call's part before all have read this one's.
        self.meeting.barrier.wait();
        gathered
    }
}
