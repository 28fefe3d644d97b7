//! Options and results of the benchmark of single kernels.

use super::Effort;
use crate::config::ModelConfig;
use crate::conformance::floors::{Bound, Rates, Sizes};

/// The total bytes of a kernel's sets of inputs: several times the size of any cache.
const SPREAD: u64 = 256 << 20;
/// The maximum number of sets.
const SETS: u64 = 40;

/// What to run.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// The shape.
    pub config: ModelConfig,
    /// The sizes in the table.
    pub sizes: Sizes,
    /// Repetitions; `None` to take no times.
    pub effort: Option<Effort>,
    /// Only kernels whose name contains this.
    pub filter: Option<String>,
}

/// A time and its clock.
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
    /// The minimum bytes that it moves.
    pub bytes: u64,
    /// Its arithmetic operations.
    pub flops: u64,
    /// The minimum seconds, if the device's rates are known.
    pub floor_seconds: Option<f64>,
    /// What limits it.
    pub bound: Option<Bound>,
    /// The measured time, if times were taken.
    pub time: Option<Time>,
    /// `||x - reference|| / ||reference||` over the sampled results.
    pub error: Option<f64>,
    /// Why there is no result, if the device refused.
    pub refused: Option<String>,
}

impl Row {
    /// Measured time over floor.
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
    /// The rates that floors are computed from; `None` if they are not known for the device.
    pub rates: Option<Rates>,
    /// The kernels.
    pub rows: Vec<Row>,
}

/// The number of sets of inputs of `bytes` each in a step.
pub(super) fn sets(bytes: u64) -> usize {
    (SPREAD / bytes.max(1)).clamp(1, SETS) as usize
}
