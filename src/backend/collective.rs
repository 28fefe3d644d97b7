//! Several ranks of one model: how the model is divided, and how partial results are combined.
//!
//! Operations work on local heads and local experts, and the loader cuts the weights; so the same model code runs on one rank
//! and on many.

use std::sync::{Arc, Barrier, Mutex, PoisonError};

/// One rank's part of the model: heads, experts and vocabulary are cut into `ranks` equal ranges, in rank order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Shard {
    /// This rank, from 0.
    pub rank: usize,
    /// The number of ranks.
    pub ranks: usize,
}

impl Shard {
    /// A single rank.
    pub const WHOLE: Self = Self { rank: 0, ranks: 1 };

    /// This rank's part of `0..len`; `None` if `len` is not a multiple of the number of ranks.
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

    /// The ranks' values, concatenated in rank order.
    fn all_gather(&self, values: &[f32]) -> Vec<f32>;
}

/// A single rank: every collective is the identity.
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

/// Ranks that are threads of one process and communicate through shared memory.
///
/// It exists to compare a sharded model with the whole model on any machine; it is not faster.
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
        // No rank may write its part of the next call before all ranks have read this call's parts.
        self.meeting.barrier.wait();
        gathered
    }
}
