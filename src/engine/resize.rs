//! Changes of an engine's pools, and of the devices that compute its layers, between two of its steps.

use std::sync::Arc;

use super::core::{Engine, pools};
#[cfg(not(target_arch = "wasm32"))]
use super::handle::EngineHandle;
use super::sequence::Sequence;
use super::speculate::VerifiedRun;
#[cfg(not(target_arch = "wasm32"))]
use crate::backend::block_on;
use crate::backend::{Caches, LayerHome, MemoryUse};
use crate::error::{EngineError, Error, Scope};

impl Engine {
    /// Changes the numbers of slots and blocks. Where there are fewer than are in use, checkpoints are evicted, sequences preempted,
    /// and imports computed here, as few as possible and the last in order first; what then is at the end of a pool moves to free
    /// places. No answer changes that fits alone, nor the longest context of one ([`Engine::context`]).
    ///
    /// # Errors
    /// Too little memory for larger pools, a device that fails, or a backend whose pools keep their size. A pool that was changed
    /// before the error has its new size ([`Engine::occupancy`]).
    pub async fn resize(&mut self, slots: usize, blocks: usize) -> Result<(), Arc<Error>> {
        let resized = self.try_resize(slots, blocks).await;
        self.noted(resized)
    }

    async fn try_resize(&mut self, slots: usize, blocks: usize) -> Result<(), Error> {
        self.settle().await?;
        // Steps keep the memory of pools that they were compiled with.
        self.step_cache.clear();
        self.make_room(slots, blocks).await?;
        let resized = self.model.resize(slots, blocks);
        let limits = self.model.limits();
        self.cache.grow(limits.slots, limits.blocks);
        Ok(resized?)
    }

    /// Computes a layer elsewhere from now on ([`Backend::place`](crate::backend::Backend::place)). With [`Caches::Discard`] all
    /// sequences are computed again ([`Engine::recompute_all`]).
    ///
    /// # Errors
    /// Too little memory there, a device that fails, or a backend whose layers have a fixed place; the layer then is where it was.
    pub async fn place(
        &mut self,
        layer: usize,
        home: &LayerHome,
        caches: Caches,
    ) -> Result<(), Arc<Error>> {
        let placed = self.try_place(layer, home, caches).await;
        self.noted(placed)
    }

    async fn try_place(
        &mut self,
        layer: usize,
        home: &LayerHome,
        caches: Caches,
    ) -> Result<(), Error> {
        match caches {
            Caches::Keep => self.settle().await?,
            Caches::Discard => self.recompute_all(),
        }
        self.step_cache.clear();
        Ok(self.model.place(layer, home, caches)?)
    }

    /// Bytes of the backend's memory by use.
    #[must_use]
    pub fn memory(&self) -> MemoryUse {
        self.model.memory()
    }

    /// Notes the failure of a device.
    fn noted(&mut self, result: Result<(), Error>) -> Result<(), Arc<Error>> {
        result.map_err(|error| match error.scope() {
            Scope::Device => self.failed(error),
            _ => Arc::new(error),
        })
    }

    /// Processes a step that was submitted ahead: no step runs afterwards.
    async fn settle(&mut self) -> Result<(), Error> {
        if let Some(mut step) = self.submitted.take() {
            let output = step.output().await;
            self.ran(step.planned, output).await?;
        }
        Ok(())
    }

    /// Makes these numbers of slots and blocks suffice for what is held.
    async fn make_room(&mut self, slots: usize, blocks: usize) -> Result<(), Error> {
        let occupancy = self.cache.occupancy();
        if slots < occupancy.all_slots {
            self.drop_spares();
        }
        loop {
            let mut pools = pools(&mut self.model);
            if self.cache.shrink_slots(&mut pools, slots).await?
                && self.cache.shrink_blocks(&mut pools, blocks).await?
            {
                return Ok(());
            }
            if !self.give_way().await? {
                return Err(EngineError::PoolsInUse { slots, blocks }.into());
            }
        }
    }

    /// Drops the slots that running sequences have besides their own.
    fn drop_spares(&mut self) {
        for sequence in &mut self.running {
            // Verified tokens are drawn again: the state after them is in the spare slot.
            sequence.verified = VerifiedRun::default();
            if let Some(allocation) = &mut sequence.allocation {
                allocation.spare = None;
            }
        }
    }

    /// Frees something of what is held: what waits first, then the last sequence that runs, then the last import. Returns whether
    /// anything was held.
    async fn give_way(&mut self) -> Result<bool, Error> {
        let mut waiting = self.waiting.iter();
        if waiting.any(|sequence| sequence.prefix.is_on_device()) || self.exports.is_on_device() {
            self.waiting_to_host().await?;
            return Ok(true);
        }
        if let Some(last) = last(&self.running) {
            self.preempt(last).await?;
            return Ok(true);
        }
        let Some(last) = last(&self.incoming) else {
            return Ok(false);
        };
        self.recompute_import(self.incoming[last].id)?;
        Ok(true)
    }
}

#[cfg(not(target_arch = "wasm32"))]
impl EngineHandle {
    /// Changes the numbers of slots and blocks between two steps ([`Engine::resize`]).
    ///
    /// # Errors
    /// Those of [`Engine::resize`], or an engine that has stopped.
    pub fn resize(&self, slots: usize, blocks: usize) -> Result<(), Arc<Error>> {
        let resized = self.ask(move |engine| block_on(engine.resize(slots, blocks)));
        resized.unwrap_or_else(|error| Err(Arc::new(error.into())))
    }

    /// Computes a layer elsewhere from the next step on ([`Engine::place`]).
    ///
    /// # Errors
    /// Those of [`Engine::place`], or an engine that has stopped.
    pub fn place(&self, layer: usize, home: LayerHome, caches: Caches) -> Result<(), Arc<Error>> {
        let placed = self.ask(move |engine| block_on(engine.place(layer, &home, caches)));
        placed.unwrap_or_else(|error| Err(Arc::new(error.into())))
    }
}

/// The last of these sequences in order.
fn last(sequences: &[Sequence]) -> Option<usize> {
    (0..sequences.len()).max_by_key(|index| sequences[*index].order())
}
