//! A sequence's place to go on from, while it is not running: after a hit, a fork, or a preemption.

use super::node::{RowsResidency, StateResidency};
use super::pool::{BlockRef, SlotRef};
use crate::backend::{Block, Slot};

/// States and latents of a sequence's first tokens. It holds what it names, in pools or in host memory; a clone is one more
/// holder of the same.
#[derive(Clone, Debug, Default)]
pub struct PrefixHandle {
    /// Number of tokens that have been computed.
    pub position: usize,
    /// The KDA states at `position`; `None` at the start of a sequence, and where they come from elsewhere. A slot may be
    /// shared: it is only read.
    pub state: Option<StateResidency>,
    /// The latents of each block. Blocks on the device are whole and may be shared; a partial one is in host memory.
    pub rows: Vec<RowsResidency>,
}

impl PrefixHandle {
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
pub struct Allocation {
    /// The slot to write: this sequence's alone.
    pub slot: SlotRef,
    /// Where the state is now.
    pub state: StateSource,
    /// Its blocks, from the first token on; those past `position` are its own.
    pub blocks: Vec<BlockRef>,
}

impl Allocation {
    /// The slot that its next tokens read; `None` at the start of a sequence.
    #[must_use]
    pub fn slot_in(&self) -> Option<Slot> {
        match &self.state {
            StateSource::Zero => None,
            StateSource::Own => Some(self.slot.get()),
            StateSource::Shared(slot) => Some(slot.get()),
        }
    }

    /// Its first `count` blocks.
    #[must_use]
    pub fn blocks(&self, count: usize) -> Vec<Block> {
        self.blocks[..count].iter().map(BlockRef::get).collect()
    }
}

/// Where a running sequence's state is.
#[derive(Debug)]
pub enum StateSource {
    /// Nowhere yet: the zero state that starts a sequence.
    Zero,
    /// In its own slot.
    Own,
    /// In a slot that others read as well.
    Shared(SlotRef),
}
