//! Measures how fast a device runs a model's shape and single kernels, beside their floors (the minimum times).
//!
//! A shape needs no checkpoint: weights and caches are random numbers that the device generates ([`shape`]). Kernels are timed one by
//! one and compared with f64 code on a sample ([`kernels`]), and the recurrence can alternate with another implementation
//! ([`interleaved`]). A checkpoint's tokens per second are measured as llama-bench does ([`throughput`]). The floors are those of
//! [`floors`](crate::conformance::floors). Nothing here affects a model in use.

pub mod interleaved;
mod kda;
mod kernel_report;
pub mod kernels;
mod layer;
mod oracle;
pub mod profile;
pub mod report;
pub mod shape;
pub mod throughput;

use std::time::{Duration, Instant};

pub use kda::Errors;

use crate::backend::{Backend, Batch, Block, Result, Segment, Slot, Step};
use crate::error::BackendError;

/// Opens a backend. Each one is dropped before the next is opened, because handles are never released.
pub type Make<'a> = &'a mut dyn FnMut() -> Result<Box<dyn Backend>>;

/// The number of repetitions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Effort {
    /// Rounds; the median is reported.
    pub rounds: usize,
    /// The minimum time of a round of submissions.
    pub round: Duration,
}

impl Default for Effort {
    fn default() -> Self {
        Self {
            rounds: 7,
            round: Duration::from_millis(50),
        }
    }
}

impl Effort {
    /// One short round, to test the tools.
    #[must_use]
    pub fn least() -> Self {
        Self {
            rounds: 1,
            round: Duration::ZERO,
        }
    }
}

/// The median of a list; NaN if it is empty.
#[must_use]
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Median seconds of one submission when each is awaited before the next: the latency of a sequence's next token.
pub(crate) fn awaited(step: &mut dyn Step, batch: &Batch, effort: Effort) -> Result<f64> {
    let once = warm(step, batch)?;
    let count = count(once, effort);
    let mut times = Vec::with_capacity(effort.rounds);
    for _ in 0..effort.rounds.max(1) {
        let start = Instant::now();
        for _ in 0..count {
            step.submit(batch)?.wait()?;
        }
        times.push(start.elapsed().as_secs_f64() / count as f64);
    }
    Ok(median(times))
}

/// Median seconds of one submission when none is awaited before the next: the device's busy time.
pub(crate) fn queued(step: &mut dyn Step, batch: &Batch, effort: Effort) -> Result<f64> {
    let once = warm(step, batch)?;
    let count = count(once, effort);
    let mut times = Vec::with_capacity(effort.rounds);
    for _ in 0..effort.rounds.max(1) {
        let start = Instant::now();
        let tickets = (0..count)
            .map(|_| step.submit(batch))
            .collect::<Result<Vec<_>>>()?;
        for ticket in tickets {
            ticket.wait()?;
        }
        times.push(start.elapsed().as_secs_f64() / count as f64);
    }
    Ok(median(times))
}

/// Runs a batch until it is compiled, loaded and, if the backend has graphs, a graph; returns the seconds of the next run.
pub(crate) fn warm(step: &mut dyn Step, batch: &Batch) -> Result<f64> {
    for _ in 0..2 {
        step.submit(batch)?.wait()?;
    }
    let start = Instant::now();
    step.submit(batch)?.wait()?;
    Ok(start.elapsed().as_secs_f64().max(1e-7))
}

fn count(once: f64, effort: Effort) -> usize {
    ((effort.round.as_secs_f64() / once).ceil() as usize).clamp(1, 200)
}

/// Median milliseconds of each operation by the device's own clock; empty if it has none.
pub(crate) fn operations(
    step: &mut dyn Step,
    batch: &Batch,
    effort: Effort,
) -> Result<Vec<(String, f64)>> {
    match step.time(true) {
        Err(BackendError::Unsupported { .. }) => return Ok(Vec::new()),
        told => told?,
    }
    let mut runs: Vec<Vec<(&'static str, f64)>> = Vec::new();
    // One more run, which is not counted.
    for round in 0..=effort.rounds.max(1) {
        let output = step.submit(batch)?.wait()?;
        if round > 0 {
            runs.push(output.milliseconds);
        }
    }
    step.time(false)?;
    let names: Vec<&'static str> = runs
        .first()
        .map(|run| run.iter().map(|(name, _)| *name).collect())
        .unwrap_or_default();
    let of = |name: &str| {
        let found = |run: &Vec<(&'static str, f64)>| {
            run.iter()
                .find(|(other, _)| *other == name)
                .map(|(_, ms)| *ms)
        };
        median(runs.iter().filter_map(found).collect())
    };
    Ok(names
        .iter()
        .map(|name| ((*name).to_owned(), of(name)))
        .collect())
}

/// The blocks of sequence number `sequence` of several sequences of `tokens` tokens each.
pub(crate) fn table(sequence: usize, tokens: usize, block_tokens: usize) -> Vec<Block> {
    let each = tokens.div_ceil(block_tokens);
    (sequence * each..(sequence + 1) * each)
        .map(|block| Block(block as u32))
        .collect()
}

/// A segment of sequence number `sequence`, whose state is in the slot of the same number.
pub(crate) fn segment(
    sequence: usize,
    position: usize,
    length: usize,
    started: bool,
    blocks: Vec<Block>,
) -> Segment {
    let slot = Slot(sequence as u32);
    Segment {
        length,
        position,
        slot_in: started.then_some(slot),
        slot_out: slot,
        checkpoints: Vec::new(),
        blocks,
    }
}
