//! States and latents in host memory, and the copies from and to the pools.
//!
//! Copies are exact: what is written back is what was read, bit for bit, in the dtypes that pools keep.

use crate::backend::{
    Backend, Block, LatentPool, LatentRecord, Result, Slot, StatePool, StateRecord,
};

/// One slot: every KDA layer's state at one token.
#[derive(Clone, Debug, PartialEq)]
pub struct SavedState {
    /// One record per KDA layer.
    pub layers: Vec<StateRecord>,
}

impl SavedState {
    /// Size in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let floats: usize = self
            .layers
            .iter()
            .map(|layer| layer.state.len() + layer.conv_state.len())
            .sum();
        4 * floats as u64
    }
}

/// One block, or the first rows of one: every MLA layer's latents of the same tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct SavedRows {
    /// One record per MLA layer.
    pub layers: Vec<LatentRecord>,
}

impl SavedRows {
    /// Size in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let bytes: usize = self.layers.iter().map(|layer| layer.rows.len()).sum();
        bytes as u64
    }
}

/// The pools of one model, with the backend that holds them.
pub struct Pools<'a> {
    /// Reads and writes them.
    pub backend: &'a mut dyn Backend,
    /// KDA states.
    pub states: StatePool,
    /// MLA latents.
    pub latents: LatentPool,
}

impl Pools<'_> {
    /// Copies a slot to host memory.
    ///
    /// # Errors
    /// A device that fails.
    pub async fn read_slot(&mut self, slot: Slot) -> Result<SavedState> {
        // All reads are started before the first is awaited.
        let tickets: Vec<_> = (0..self.states.layout.layers)
            .map(|layer| self.backend.read_state(&self.states, layer, slot))
            .collect();
        let mut layers = Vec::with_capacity(tickets.len());
        for ticket in tickets {
            layers.push(ticket.await?);
        }
        Ok(SavedState { layers })
    }

    /// Overwrites a slot.
    ///
    /// # Errors
    /// Records of another shape.
    pub fn write_slot(&mut self, slot: Slot, saved: &SavedState) -> Result<()> {
        for (layer, record) in saved.layers.iter().enumerate() {
            self.backend
                .write_state(&self.states, layer, slot, record)?;
        }
        Ok(())
    }

    /// Copies the first `tokens` rows of each block to host memory.
    ///
    /// # Errors
    /// A device that fails.
    pub async fn read_blocks(&mut self, blocks: &[(Block, usize)]) -> Result<Vec<SavedRows>> {
        let layers = self.latents.layout.layers;
        let tickets: Vec<_> = blocks
            .iter()
            .flat_map(|block| (0..layers).map(move |layer| (layer, block)))
            .map(|(layer, (block, tokens))| {
                self.backend
                    .read_latents(&self.latents, layer, *block, *tokens)
            })
            .collect();
        let mut records = Vec::with_capacity(tickets.len());
        for ticket in tickets {
            records.push(ticket.await?);
        }
        let mut records = records.into_iter();
        let take = |_| SavedRows {
            layers: records.by_ref().take(layers).collect(),
        };
        Ok(blocks.iter().map(take).collect())
    }

    /// Overwrites the first rows of a block.
    ///
    /// # Errors
    /// Records of another shape.
    pub fn write_block(&mut self, block: Block, saved: &SavedRows) -> Result<()> {
        for (layer, record) in saved.layers.iter().enumerate() {
            self.backend
                .write_latents(&self.latents, layer, block, record)?;
        }
        Ok(())
    }
}
