//! A sequence's place to go on from, while it is not running: after a hit, a fork, or a preemption.

use super::tree::{HeldRows, HeldState};

/// States and latents of a sequence's first tokens. What it holds in pools is held on its behalf until it is placed or
/// released by the [`Cache`](super::Cache) that gave it.
#[derive(Debug, Default)]
pub struct Lease {
    /// Tokens that are through.
    pub position: usize,
    /// The KDA states at `position`; nothing at the start of a sequence. A slot may be shared: it is only read.
    pub state: Option<HeldState>,
    /// The latents of each block. Blocks on the device are whole and may be shared; a partial one is in host memory.
    pub rows: Vec<HeldRows>,
}

impl Lease {
    /// Whether it holds anything on the device.
    #[must_use]
    pub fn is_on_device(&self) -> bool {
        let state = self
            .state
            .as_ref()
            .is_some_and(|state| state.device().is_some());
        state || self.rows.iter().any(|rows| rows.device().is_some())
    }
}

/// A running sequence's places.
#[derive(Debug)]
pub struct Placed {
    /// The slot to write: this sequence's alone.
    pub slot: crate::backend::Slot,
    /// Where the state is now.
    pub state: Current,
    /// Its blocks, from the first token on; those past `position` are its own.
    pub blocks: Vec<crate::backend::Block>,
}

/// Where a running sequence's state is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Current {
    /// Nowhere yet: the zero state that starts a sequence.
    Zero,
    /// In its own slot.
    Own,
    /// In a slot that others read as well.
    Shared(crate::backend::Slot),
}
