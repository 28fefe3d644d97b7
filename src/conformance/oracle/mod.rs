//! What every operation must compute, in naive f64 code: one loop per formula, no code shared with a backend.
//!
//! It is slow and meant to be compared with the paper. Inputs are those of the device (already rounded to its precision), so
//! the whole difference is the device's error.

mod dense;
mod kda;
mod mla;
mod moe;
mod sample;

pub use dense::*;
pub use kda::{Recurrence, gated_norm, log_decay, short_conv, write_strength};
pub use mla::{Attention, append};
pub use moe::{Router, experts};
pub use sample::{sample_error, sample_order};

/// `1 / (1 + e^-x)`.
#[must_use]
pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `x sigmoid(x)`.
#[must_use]
pub fn silu(x: f64) -> f64 {
    x * sigmoid(x)
}

/// Widens a list.
#[must_use]
pub fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|value| f64::from(*value)).collect()
}
