//! Counts of the requests that went through this frontend.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use kimi_linear::engine::Usage;
use serde::Serialize;

/// Answers' lengths that are kept until they are taken.
const KEPT: usize = 4096;

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// All of its answers are complete.
    Finished,
    /// The client cancelled it.
    Cancelled,
    /// It failed.
    Failed,
}

/// Counters since the start; all of them only grow, apart from the number of running requests.
#[derive(Debug, Default)]
pub struct Totals {
    taken: AtomicU64,
    ended: [AtomicU64; 3],
    /// Answers by workers that prefill and decode their own requests.
    aggregated: AtomicU64,
    /// Times that an answer went on at another worker.
    migrated: AtomicU64,
    prompt_tokens: AtomicU64,
    cached_tokens: AtomicU64,
    generated_tokens: AtomicU64,
    /// Tokens of answers since they were last taken.
    answers: Mutex<Vec<u32>>,
}

/// The counters at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counted {
    /// Requests that were taken.
    pub total: u64,
    /// Those that run.
    pub running: u64,
    /// Those that are complete.
    pub finished: u64,
    /// Those that failed.
    pub failed: u64,
    /// Those that clients cancelled.
    pub cancelled: u64,
    /// Answers by workers that prefill and decode their own requests.
    pub aggregated: u64,
    /// Times that an answer went on at another worker, after the loss of its own.
    pub migrated: u64,
    /// Prompt tokens of complete answers.
    #[serde(skip)]
    pub prompt_tokens: u64,
    /// Those of them that came from a cache.
    #[serde(skip)]
    pub cached_tokens: u64,
    /// Tokens that were generated.
    #[serde(skip)]
    pub generated_tokens: u64,
}

impl Totals {
    /// A request was taken.
    pub fn taken(&self) {
        self.taken.fetch_add(1, Relaxed);
    }

    /// An answer goes to a worker that prefills and decodes it.
    pub fn aggregated(&self) {
        self.aggregated.fetch_add(1, Relaxed);
    }

    /// An answer goes on at another worker.
    pub fn migrated(&self) {
        self.migrated.fetch_add(1, Relaxed);
    }

    /// An answer has ended.
    pub fn answered(&self, usage: &Usage) {
        self.prompt_tokens
            .fetch_add(usage.prompt_tokens as u64, Relaxed);
        self.cached_tokens
            .fetch_add(usage.cached_tokens as u64, Relaxed);
        self.generated_tokens
            .fetch_add(usage.generated_tokens as u64, Relaxed);
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        if answers.len() < KEPT {
            answers.push(u32::try_from(usage.generated_tokens).unwrap_or(u32::MAX));
        }
    }

    /// A request has ended.
    pub fn ended(&self, how: End) {
        self.ended[how as usize].fetch_add(1, Relaxed);
    }

    /// Tokens of the answers since the last call.
    #[must_use]
    pub fn take_answers(&self) -> Vec<u32> {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut answers)
    }

    /// The counters.
    #[must_use]
    pub fn counted(&self) -> Counted {
        let load = |counter: &AtomicU64| counter.load(Relaxed);
        let [finished, cancelled, failed] = self.ended.each_ref().map(load);
        // Read after the others, so that it is never less than their sum.
        let total = load(&self.taken);
        Counted {
            total,
            running: total.saturating_sub(finished + cancelled + failed),
            finished,
            failed,
            cancelled,
            aggregated: load(&self.aggregated),
            migrated: load(&self.migrated),
            prompt_tokens: load(&self.prompt_tokens),
            cached_tokens: load(&self.cached_tokens),
            generated_tokens: load(&self.generated_tokens),
        }
    }
}
