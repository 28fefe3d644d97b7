//! What the handles of a replica stand for, and where the values of its activations are.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use super::store::{Entry, Held};
use crate::backend::handles::Handles;
use crate::backend::relocate::Relocate;
use crate::backend::{LatentPool, Op, Result, StatePool, Tensor, Weight};
use crate::error::BackendError;

/// A weight of a layer.
pub(super) struct ReplicaWeight {
    pub(super) layer: usize,
    /// Where it comes from, and what devices have of it.
    pub(super) entry: Arc<Entry>,
    /// Whole on one device, or parts of experts, in the order of the home's devices.
    pub(super) held: Vec<Held>,
}

/// An activation: its handle on each device that has it; devices past the end have none.
pub(super) struct ReplicaTensor {
    pub(super) on: Vec<Option<Tensor>>,
}

/// One layer of a pool, as a pool of its own.
pub(super) struct PoolLayer<P> {
    /// The layer, counted among all of the model.
    pub(super) layer: usize,
    pub(super) device: usize,
    pub(super) pool: P,
}

/// A pool of several layers.
pub(super) struct ReplicaPool<P> {
    pub(super) layers: Vec<PoolLayer<P>>,
}

/// All of them.
pub(super) type Tables =
    Handles<ReplicaWeight, ReplicaTensor, ReplicaPool<StatePool>, ReplicaPool<LatentPool>>;

impl Tables {
    /// Whether several devices have a part of a weight each.
    pub(super) fn is_divided(&self, weight: Weight) -> Result<bool> {
        Ok(self.weights.get(self.backend, weight)?.held.len() > 1)
    }

    /// The number of a device among those that have a part of a weight.
    pub(super) fn part_on(&self, weight: Weight, device: usize) -> Result<usize> {
        let held = &self.weights.get(self.backend, weight)?.held;
        let found = held.iter().position(|held| held.device == device);
        found.ok_or_else(|| elsewhere(self.backend, "a weight"))
    }
}

/// The handles of one device.
pub(super) struct OnDevice<'a> {
    pub(super) tables: &'a Tables,
    pub(super) device: usize,
}

impl Relocate for OnDevice<'_> {
    fn tensor(&self, tensor: Tensor) -> Result<Tensor> {
        let tables = self.tables;
        let on = &tables.tensors.get(tables.backend, tensor)?.on;
        let known = on.get(self.device).copied().flatten();
        known.ok_or_else(|| elsewhere(tables.backend, "an activation"))
    }

    fn weight(&self, weight: Weight) -> Result<Weight> {
        let part = self.tables.part_on(weight, self.device)?;
        Ok(self.tables.weights.known(weight).held[part].weight)
    }

    fn states(&self, pool: StatePool, layer: usize) -> Result<(StatePool, usize)> {
        let pool = self.tables.states.get(self.tables.backend, pool)?;
        self.layer(&pool.layers[layer])
    }

    fn latents(&self, pool: LatentPool, layer: usize) -> Result<(LatentPool, usize)> {
        let pool = self.tables.latents.get(self.tables.backend, pool)?;
        self.layer(&pool.layers[layer])
    }
}

impl OnDevice<'_> {
    fn layer<P: Copy>(&self, layer: &PoolLayer<P>) -> Result<(P, usize)> {
        if layer.device != self.device {
            return Err(elsewhere(self.tables.backend, "a layer of a pool"));
        }
        Ok((layer.pool, 0))
    }
}

fn elsewhere(backend: &'static str, what: &str) -> BackendError {
    BackendError::Unsupported {
        backend,
        what: format!("an operation on {what} of another device"),
    }
}

/// Collects the tensors of operations, with the scratch of blocks and drawn tokens.
#[derive(Default)]
struct Collect(RefCell<Vec<Tensor>>);

impl Relocate for Collect {
    fn tensor(&self, tensor: Tensor) -> Result<Tensor> {
        let mut found = self.0.borrow_mut();
        if !found.contains(&tensor) {
            found.push(tensor);
        }
        Ok(tensor)
    }

    fn weight(&self, weight: Weight) -> Result<Weight> {
        Ok(weight)
    }

    fn states(&self, pool: StatePool, layer: usize) -> Result<(StatePool, usize)> {
        Ok((pool, layer))
    }

    fn latents(&self, pool: LatentPool, layer: usize) -> Result<(LatentPool, usize)> {
        Ok((pool, layer))
    }
}

/// All tensors of operations.
pub(super) fn tensors_of(ops: &[Op]) -> Result<Vec<Tensor>> {
    let collect = Collect::default();
    for op in ops {
        op.relocated(&collect)?;
    }
    Ok(collect.0.into_inner())
}

/// A tensor of a device.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct TensorOn {
    pub(super) device: usize,
    pub(super) tensor: Tensor,
}

/// The devices that have the last values of each of a replica's tensors; those that nothing has written are not in it.
#[derive(Default)]
pub(super) struct Values(HashMap<usize, Vec<TensorOn>>);

impl Values {
    /// The devices with the last values of a tensor.
    pub(super) fn of(&self, tensor: Tensor) -> &[TensorOn] {
        self.0.get(&tensor.id).map_or(&[], Vec::as_slice)
    }

    /// These devices have them, and no other.
    pub(super) fn set(&mut self, tensor: Tensor, on: Vec<TensorOn>) {
        self.0.insert(tensor.id, on);
    }

    /// One more device has them.
    pub(super) fn add(&mut self, tensor: Tensor, on: TensorOn) {
        self.0.entry(tensor.id).or_default().push(on);
    }

    /// No device has them.
    pub(super) fn clear(&mut self, tensor: Tensor) {
        self.0.remove(&tensor.id);
    }

    /// A device is gone with what it had.
    pub(super) fn forget(&mut self, device: usize) {
        let all = self.0.values_mut();
        all.for_each(|on| on.retain(|it| it.device != device));
    }
}
