//! Changes of a loaded model between two steps: the size of its pools, and the devices that compute its layers.

use super::{AttentionBlock, Model};
use crate::backend::{Caches, LayerHome, MemoryUse};
use crate::error::BackendError;

impl Model {
    /// Changes the numbers of slots and of blocks; the contents of those that stay are kept. A pool that shrinks does so before the
    /// other one grows. Steps that were compiled before are refused afterwards, and should be dropped before: they keep memory.
    ///
    /// # Errors
    /// Too little memory, a device that fails, or a backend whose pools keep their size. A pool that was changed before the error has
    /// its new size: [`Model::limits`] has the sizes that there are.
    pub fn resize(&mut self, slots: usize, blocks: usize) -> Result<(), BackendError> {
        if slots < self.limits.slots {
            self.resize_states(slots)?;
            self.resize_latents(blocks)
        } else {
            self.resize_latents(blocks)?;
            self.resize_states(slots)
        }
    }

    fn resize_states(&mut self, slots: usize) -> Result<(), BackendError> {
        if slots == self.limits.slots {
            return Ok(());
        }
        self.states = self.backend.resize_states(&self.states, slots)?;
        self.limits.slots = slots;
        for layer in &mut self.layers {
            if let AttentionBlock::Kda(block) = &mut layer.attention {
                block.pool = self.states;
            }
        }
        Ok(())
    }

    fn resize_latents(&mut self, blocks: usize) -> Result<(), BackendError> {
        if blocks == self.limits.blocks {
            return Ok(());
        }
        self.latents = self.backend.resize_latents(&self.latents, blocks)?;
        self.limits.blocks = blocks;
        for layer in &mut self.layers {
            if let AttentionBlock::Mla(block) = &mut layer.attention {
                block.pool = self.latents;
            }
        }
        Ok(())
    }

    /// Computes a layer elsewhere from now on. Steps that were compiled before are refused afterwards.
    ///
    /// # Errors
    /// A backend whose layers have a fixed place, or too little memory there; the layer then is where it was.
    pub fn place(
        &mut self,
        layer: usize,
        home: &LayerHome,
        caches: Caches,
    ) -> Result<(), BackendError> {
        let layers = self.layers.len();
        if layer >= layers {
            return Err(BackendError::Shape {
                operation: "place",
                what: "the layer",
                expected: format!("below {layers}"),
                found: layer.to_string(),
            });
        }
        self.backend.place(layer, home, caches)
    }

    /// Bytes of the backend's memory by use.
    #[must_use]
    pub fn memory(&self) -> MemoryUse {
        self.backend.memory()
    }

    /// Bytes of a slot of states in all layers, and of a block of latents.
    #[must_use]
    pub fn cache_bytes(&self) -> (u64, u64) {
        let slot = self.states.resized(1).layout.bytes();
        let block = self.latents.resized(1).layout.bytes();
        (slot, block)
    }
}
