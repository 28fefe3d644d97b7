//! An engine at one moment, as its watchers see it.

use super::core::Engine;
use crate::cache::Occupancy;

/// What runs, what waits, and what is in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Status {
    /// Sequences that run.
    pub running: usize,
    /// Sequences that wait.
    pub waiting: usize,
    /// How often a sequence had to make room so far.
    pub preemptions: u64,
    /// The pools.
    pub occupancy: Occupancy,
}

impl Engine {
    /// What runs, what waits, and what of the pools is in use.
    #[must_use]
    pub fn status(&self) -> Status {
        let (running, waiting) = self.load();
        Status {
            running,
            waiting,
            preemptions: self.preemptions(),
            occupancy: self.occupancy(),
        }
    }
}
