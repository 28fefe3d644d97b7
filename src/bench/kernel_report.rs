//! What the bench of single kernels is asked, and what it finds.

use super::Effort;
use crate::config::ModelConfig;
use crate::conformance::floors::{Bound, Rates, Sizes};

/// Bytes that a kernel's sets of inputs have together: several times any cache.
const SPREAD: u64 = 256 << 20;
/// The most sets.
const SETS: u64 = 40;

/// What is run.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// The shape.
    pub config: ModelConfig,
    /// Sizes of the table.
    pub sizes: Sizes,
    /// Repetitions; `None` where no time is to be taken.
    pub effort: Option<Effort>,
    /// Only kernels whose name contains this.
    pub filter: Option<String>,
}

/// A time and the clock that it is from.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Time {
    /// Median seconds of one run of the kernel.
    pub seconds: f64,
    /// `queued` or `timestamps`.
    pub clock: &'static str,
}

/// One kernel on one device.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Row {
    /// The kernel and its size.
    pub name: String,
    /// The operation that computes it.
    pub operation: &'static str,
    /// Bytes that it moves at the least.
    pub bytes: u64,
    /// Operations that it does.
    pub flops: u64,
    /// The least seconds, where the device's rates are known.
    pub floor_seconds: Option<f64>,
    /// What sets them.
    pub bound: Option<Bound>,
    /// What was measured, if times were taken.
    pub time: Option<Time>,
    /// `||x - reference|| / ||reference||` over the sample.
    pub error: Option<f64>,
    /// Why there is nothing to see, where the device refused.
    pub refused: Option<String>,
}

impl Row {
    /// Measured over floor.
    #[must_use]
    pub fn ratio(&self) -> Option<f64> {
        Some(self.time?.seconds / self.floor_seconds?)
    }
}

/// Every kernel of one device.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Report {
    /// The device.
    pub device: crate::backend::Device,
    /// The rates that floors are taken from: those known of the device, else nothing.
    pub rates: Option<Rates>,
    /// The kernels.
    pub rows: Vec<Row>,
}

/// How many sets of inputs of so many bytes a step goes through.
pub(super) fn sets(bytes: u64) -> usize {
    (SPREAD / bytes.max(1)).clamp(1, SETS) as usize
}
