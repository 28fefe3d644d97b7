//! Floors in words: numbers with their units, and the table of the documents.

use std::fmt::Write as _;

use super::{Bound, Kernel, Rates, Sizes, kernels};
use crate::config::ModelConfig;

/// A context as people say it.
#[must_use]
pub fn tokens_name(tokens: usize) -> String {
    match tokens {
        n if n >= 1 << 20 && n.is_multiple_of(1 << 20) => format!("{}M", n >> 20),
        n if n >= 1 << 10 && n.is_multiple_of(1 << 10) => format!("{}K", n >> 10),
        n => n.to_string(),
    }
}

/// Bytes in the unit that suits them.
#[must_use]
pub fn bytes_name(bytes: u64) -> String {
    scaled(bytes as f64, &["B", "KB", "MB", "GB", "TB"])
}

/// Operations in the unit that suits them.
#[must_use]
pub fn flops_name(flops: u64) -> String {
    scaled(flops as f64 / 1e6, &["MFLOP", "GFLOP", "TFLOP", "PFLOP"])
}

/// Seconds in the unit that suits them.
#[must_use]
pub fn seconds_name(seconds: f64) -> String {
    scaled(seconds * 1e6, &["us", "ms", "s"])
}

/// Three digits and the unit in which the number is below a thousand.
fn scaled(mut value: f64, units: &[&str]) -> String {
    let mut unit = units.iter();
    let mut name = unit.next().copied().unwrap_or_default();
    while value >= 999.5 {
        let Some(next) = unit.next() else { break };
        (value, name) = (value / 1000.0, next);
    }
    let digits = if value >= 99.95 {
        0
    } else if value >= 9.995 {
        1
    } else {
        2
    };
    format!("{value:.digits$} {name}")
}

/// The table of `docs/performance/hopper.md`.
#[must_use]
pub fn markdown(config: &ModelConfig, rates: &Rates) -> String {
    let mut list = kernels(config, &Sizes::published());
    for context in [4 << 10, 128 << 10, 1 << 20] {
        list.push(Kernel::Step {
            context,
            sequences: 1,
        });
    }
    let mut text = String::from(
        "| kernel | bytes | operations | floor | set by |\n|---|---:|---:|---:|---|\n",
    );
    for kernel in list {
        let work = kernel.work(config);
        let (seconds, bound) = work.floor(rates);
        let bound = match bound {
            Bound::Bytes => "bytes",
            Bound::Operations => "operations",
        };
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {bound} |",
            kernel.name(),
            bytes_name(work.bytes),
            flops_name(work.flops),
            seconds_name(seconds)
        );
    }
    text
}
