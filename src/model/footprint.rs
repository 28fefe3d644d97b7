//! What each of several devices holds of a model, counted without a device.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::{Limits, Model, StepOptions};
use crate::backend::dry::DryBackend;
use crate::backend::{Backend, DrawCapacity, Group, MemoryUse, Parallelism};
use crate::config::ModelConfig;
use crate::error::Error;

/// What several devices hold of a model, and what is sent between them.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Footprint {
    /// The memory of each rank, with weights in the model's unquantised dtypes.
    pub ranks: Vec<MemoryUse>,
    /// Bytes between devices and host for each token of a step, where devices do not exchange results by themselves.
    pub sent_per_token: u64,
    /// Bytes for each row of logits.
    pub sent_per_output: u64,
}

impl Footprint {
    /// The model divided to these degrees, with pools and steps of these sizes.
    ///
    /// # Errors
    /// Degrees that do not divide the model.
    pub fn new(config: &ModelConfig, degrees: Parallelism, limits: Limits) -> Result<Self, Error> {
        let devices: Vec<DryBackend> = (0..degrees.ranks()).map(|_| DryBackend::new()).collect();
        let used: Vec<_> = devices.iter().map(DryBackend::used).collect();
        let devices = devices.into_iter();
        let devices = devices.map(|device| Box::new(device) as Box<dyn Backend>);
        let group = Group::new(devices.collect(), degrees, config)?;
        let traffic = group.traffic();
        let mut model = Model::random(config, 0, Box::new(group), limits, &mut |_| {})?;
        let options = StepOptions {
            candidates: 1,
            keep_rows: false,
            probe_hidden: false,
            draws: DrawCapacity::NONE,
        };
        model.step(limits.step, options)?;
        let ranks = used.iter().map(|used| {
            let used = used.lock().unwrap_or_else(PoisonError::into_inner);
            *used
        });
        Ok(Self {
            ranks: ranks.collect(),
            sent_per_token: traffic.per_token.load(Ordering::Relaxed),
            sent_per_output: traffic.per_output.load(Ordering::Relaxed),
        })
    }

    /// The weights of the rank that has most, in bytes, of a model whose weights take `stored` bytes.
    #[must_use]
    pub fn heaviest(&self, stored: u64, unquantised: u64) -> u64 {
        let most = self.ranks.iter().map(|rank| rank.weights).max();
        let share = most.unwrap_or_default() as f64 / unquantised.max(1) as f64;
        (stored as f64 * share) as u64
    }
}
