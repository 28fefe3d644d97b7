//! The state of an engine at one moment, for monitoring.

use super::core::Engine;
use super::speculate::Speculated;
use crate::cache::Occupancy;

/// Numbers of sequences, and usage of the pools.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Status {
    /// Number of running sequences.
    pub running: usize,
    /// Number of waiting sequences.
    pub waiting: usize,
    /// Number of preemptions so far.
    pub preemptions: u64,
    /// Numbers of proposals so far.
    pub speculated: Speculated,
    /// The pools.
    pub occupancy: Occupancy,
}

impl Engine {
    /// Running and waiting sequences, and usage of the pools.
    #[must_use]
    pub fn status(&self) -> Status {
        let (running, waiting) = self.load();
        Status {
            running,
            waiting,
            preemptions: self.preemptions(),
            speculated: self.speculated(),
            occupancy: self.occupancy(),
        }
    }
}
