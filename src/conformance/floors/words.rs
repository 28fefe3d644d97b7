//! Floors as text: numbers with their units, and the table of the documents.

use std::fmt::Write as _;

use super::{Bound, Kernel, Rates, Sizes, kernels};
use crate::config::ModelConfig;

/// A context length, with K or M.
#[must_use]
pub fn tokens_name(tokens: usize) -> String {
    match tokens {
        n if n >= 1 << 20 && n.is_multiple_of(1 << 20) => format!("{}M", n >> 20),
        n if n >= 1 << 10 && n.is_multiple_of(1 << 10) => format!("{}K", n >> 10),
        n => n.to_string(),
    }
}

/// Bytes with a unit.
#[must_use]
pub fn bytes_name(bytes: u64) -> String {
    scaled(bytes as f64, &["B", "KB", "MB", "GB", "TB"])
}

/// Operations with a unit.
#[must_use]
pub fn flops_name(flops: u64) -> String {
    scaled(flops as f64 / 1e6, &["MFLOP", "GFLOP", "TFLOP", "PFLOP"])
}

/// Seconds with a unit.
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

/// The table of `docs/performance/hopper.md`: a column of floors for an H200 and one for an H100.
#[must_use]
pub fn markdown(config: &ModelConfig) -> String {
    let mut list = kernels(config, &Sizes::published());
    for (context, sequences) in [(4 << 10, 1), (4 << 10, 64), (128 << 10, 1), (1 << 20, 1)] {
        list.push(Kernel::Step { context, sequences });
    }
    let mut text = String::from(
        "| kernel | bytes | operations | floor, H200 | set by | floor, H100 | set by |\n|---|---:|---:|---:|---|---:|---|\n",
    );
    for kernel in list {
        let work = kernel.work(config);
        let floors = [Rates::h200(), Rates::h100()].map(|rates| {
            let (seconds, bound) = work.floor(&rates);
            let bound = match bound {
                Bound::Bytes => "bytes",
                Bound::Operations => "operations",
            };
            format!("{} | {bound}", seconds_name(seconds))
        });
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} |",
            kernel.name(),
            bytes_name(work.bytes),
            flops_name(work.flops),
            floors.join(" | ")
        );
    }
    text
}
