//! What the controller of a group asks of its engines, in this process or in another.

use std::sync::Arc;

use super::sizes::PoolSizes;
use super::state::ParameterState;
use crate::backend::{Caches, LayerHome, block_on};
use crate::engine::{Engine, EngineHandle, Status};
use crate::error::{EngineError, Error};

pub(super) type Result<T> = std::result::Result<T, Arc<Error>>;

/// The engine of a replica. Each call is made between two of its steps.
pub(super) trait Member: Sync {
    /// Whether it can still be asked.
    fn is_running(&self) -> bool;

    /// Its status; `None` if it has stopped.
    fn status(&self) -> Option<Status>;

    /// Computes a layer elsewhere from now on.
    ///
    /// # Errors
    /// Those of [`Engine::place`].
    fn place(&self, layer: usize, home: LayerHome, caches: Caches) -> Result<()>;

    /// Changes the size of the pools.
    ///
    /// # Errors
    /// Those of [`Engine::resize`].
    fn resize(&self, sizes: PoolSizes) -> Result<()>;

    /// Has all sequences computed again from their tokens.
    ///
    /// # Errors
    /// An engine that has stopped.
    fn recompute_all(&self) -> Result<()>;

    /// Goes on after an error of a device.
    ///
    /// # Errors
    /// An engine that has stopped.
    fn resume(&self) -> Result<()>;

    /// Its parameters are in another state from now on, with pools of these sizes.
    fn note(&self, _state: ParameterState, _sizes: PoolSizes) {}
}

/// The engines of all replicas.
pub(super) trait Members: Send + Sync {
    fn engine(&self, replica: usize) -> &dyn Member;

    /// Ends a replica that is lost; what it has on devices of others is free afterwards.
    fn end(&self, replica: usize);

    /// Number of answers that have gone on at another replica so far.
    fn migrated(&self) -> u64;

    /// A replica that was lost and has come back, whole and with pools of the size for that.
    fn returned(&self) -> Option<usize> {
        None
    }

    /// A replica that has come back is used from now on.
    fn begin(&self, _replica: usize) {}
}

pub(super) fn stopped() -> Arc<Error> {
    Arc::new(EngineError::Stopped.into())
}

fn ask<T: Send + 'static>(
    engine: &EngineHandle,
    work: impl FnOnce(&mut Engine) -> T + Send + 'static,
) -> Result<T> {
    engine.ask(work).map_err(|_| stopped())
}

impl Member for EngineHandle {
    fn is_running(&self) -> bool {
        EngineHandle::is_running(self)
    }

    fn status(&self) -> Option<Status> {
        EngineHandle::status(self).ok()
    }

    fn place(&self, layer: usize, home: LayerHome, caches: Caches) -> Result<()> {
        ask(self, move |engine| {
            block_on(engine.place(layer, &home, caches))
        })?
    }

    fn resize(&self, sizes: PoolSizes) -> Result<()> {
        let PoolSizes { slots, blocks } = sizes;
        ask(self, move |engine| block_on(engine.resize(slots, blocks)))?
    }

    fn recompute_all(&self) -> Result<()> {
        ask(self, Engine::recompute_all)
    }

    fn resume(&self) -> Result<()> {
        ask(self, Engine::resume)
    }
}
