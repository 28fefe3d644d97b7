//! The state of an engine at one moment, for monitoring.

use super::core::Engine;
use super::speculate::Speculated;
use crate::cache::{Occupancy, Residency};

/// Numbers of sequences, and usage of the pools.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
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
    /// What sequences need of them.
    pub demand: Demand,
    /// Whether nothing runs because the device has failed ([`Engine::device_error`]).
    pub suspended: bool,
}

/// What sequences need of the pools.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Demand {
    /// Slots in use, without those that only checkpoints use, which are evicted when a sequence needs them.
    pub held_slots: usize,
    /// Blocks in use, without those that only checkpoints use.
    pub held_blocks: usize,
    /// Slots that waiting sequences need: one each. Only as many are counted as may run in addition to those that do.
    pub queued_slots: usize,
    /// Blocks that they need for the tokens that each has so far, without those that it holds already. What each may find cached is
    /// not known.
    pub queued_blocks: usize,
    /// All slots.
    pub all_slots: usize,
    /// All blocks.
    pub all_blocks: usize,
    /// Bytes of a slot: the states of all layers.
    pub slot_bytes: u64,
    /// Bytes of a block: the latents of all layers.
    pub block_bytes: u64,
}

impl Demand {
    /// Bytes of this number of slots and blocks.
    #[must_use]
    pub fn bytes(&self, slots: usize, blocks: usize) -> u64 {
        slots as u64 * self.slot_bytes + blocks as u64 * self.block_bytes
    }
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
            demand: self.demand(),
            suspended: self.device_error().is_some(),
        }
    }

    /// What sequences need of the pools.
    #[must_use]
    pub fn demand(&self) -> Demand {
        let (slot_bytes, block_bytes) = self.model.cache_bytes();
        let limits = self.model.limits();
        let occupancy = self.occupancy();
        let more = limits.step.segments.saturating_sub(self.running.len());
        let blocks = self.waiting.iter().take(more).map(|sequence| {
            let held = sequence.prefix.rows.iter();
            let held = held.filter_map(Residency::device).count();
            sequence.tokens.len().div_ceil(limits.block_tokens) - held
        });
        Demand {
            held_slots: occupancy.slots - occupancy.idle_slots,
            held_blocks: occupancy.blocks - occupancy.idle_blocks,
            queued_slots: self.waiting.len().min(more),
            queued_blocks: blocks.sum(),
            all_slots: occupancy.all_slots,
            all_blocks: occupancy.all_blocks,
            slot_bytes,
            block_bytes,
        }
    }
}
