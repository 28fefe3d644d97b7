//! What a sequence holds in the pools: while it runs an [`Allocation`], before and between a [`PrefixHandle`] to continue from
//! after a cache hit, a fork or a preemption.

use super::node::{RowsResidency, StateResidency};
use super::pool::{BlockRef, SlotRef};
use crate::backend::{Block, Slot};

/// References to the states and latents of a sequence's first tokens, in pools or in host memory.
#[derive(Clone, Debug, Default)]
pub struct PrefixHandle {
    /// Number of tokens that have been computed.
    pub position: usize,
    /// The KDA states at `position`; `None` at the start of a sequence, and where they are imported. A slot may be shared, since it
    /// is only read.
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

/// The slot and blocks of a running sequence.
#[derive(Debug)]
pub struct Allocation {
    /// The slot that its states are written to; no other sequence uses it.
    pub slot: SlotRef,
    /// The slot that holds its present state.
    pub state: StateSource,
    /// A second slot of its own, for the state after a token that is not known yet: the present state is kept meanwhile.
    pub spare: Option<SlotRef>,
    /// Its blocks, from the first token on; those past `position` are not shared.
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
    /// The zero state that starts a sequence; no slot holds it.
    Zero,
    /// In its own slot.
    Own,
    /// In a shared slot.
    Shared(SlotRef),
}
