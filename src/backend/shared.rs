//! Backends that another backend drives, and what passes between them through the host's memory.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Backend, Batch, Result, Rows, StepOutput, Tensor, TensorValues, Ticket};
use crate::error::BackendError;

/// A backend that another one drives; it is shared with the steps.
#[derive(Clone)]
pub(super) struct SharedBackend {
    backend: Arc<Mutex<Box<dyn Backend>>>,
    /// Whether it said that its device was lost.
    lost: Arc<AtomicBool>,
}

impl SharedBackend {
    pub(super) fn new(backend: Box<dyn Backend>) -> Self {
        Self {
            backend: Arc::new(Mutex::new(backend)),
            lost: Arc::default(),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Box<dyn Backend>> {
        // A panic while the lock was held is a bug in an operation, whose output is undefined anyway.
        self.backend.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes on the result of a call, and notes if it says that the device was lost.
    pub(super) fn noted<T>(&self, result: Result<T>) -> Result<T> {
        if matches!(result, Err(BackendError::Lost { .. })) {
            self.lose();
        }
        result
    }

    /// Notes that the device was lost.
    pub(super) fn lose(&self) {
        self.lost.store(true, Ordering::Release);
    }

    /// Notes that the device is there again.
    pub(super) fn found(&self) {
        self.lost.store(false, Ordering::Release);
    }

    /// Whether the device was lost, as far as it is known.
    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }
}

/// A tensor of such a backend.
#[derive(Clone)]
pub(super) struct On {
    pub(super) backend: SharedBackend,
    pub(super) tensor: Tensor,
}

impl On {
    /// The number of its rows that a batch has.
    pub(super) fn rows(&self, batch: &Batch) -> usize {
        match self.tensor.rows {
            Rows::Tokens => batch.tokens.len(),
            Rows::Outputs => batch.outputs.len(),
        }
    }

    /// Starts to read its first `rows` rows.
    pub(super) fn read(&self, rows: usize) -> Ticket<TensorValues> {
        self.backend.lock().read_tensor(self.tensor, rows)
    }

    /// Overwrites its first rows.
    pub(super) fn write(&self, values: &TensorValues) -> Result<()> {
        let written = self.backend.lock().write_tensor(self.tensor, values);
        self.backend.noted(written)
    }
}

/// Bytes between devices and the host, of a backend that drives others.
#[derive(Debug, Default)]
pub struct Traffic {
    /// For each token of the step that was compiled last.
    pub per_token: AtomicU64,
    /// For each of its output rows.
    pub per_output: AtomicU64,
    /// Of all submissions so far.
    pub sent: AtomicU64,
}

impl Traffic {
    /// Notes what a step will send that reads or writes these places once in each submission.
    pub(super) fn note<'a>(&self, places: impl Iterator<Item = &'a On>) {
        let (mut tokens, mut outputs) = (0, 0);
        for place in places {
            let bytes = 4 * place.tensor.width as u64;
            match place.tensor.rows {
                Rows::Tokens => tokens += bytes,
                Rows::Outputs => outputs += bytes,
            }
        }
        self.per_token.store(tokens, Ordering::Relaxed);
        self.per_output.store(outputs, Ordering::Relaxed);
    }

    /// Counts values that were sent, of four bytes each.
    pub(super) fn add(&self, values: usize) {
        self.sent.fetch_add(4 * values as u64, Ordering::Relaxed);
    }
}

impl StepOutput {
    /// Adds the results of the next part of a step.
    pub(super) fn extend(&mut self, found: StepOutput) {
        self.choices.extend(found.choices);
        self.draws.extend(found.draws);
        self.logits.extend(found.logits);
        self.probes.extend(found.probes);
        let times = found.milliseconds.into_iter();
        times.for_each(|(name, time)| self.add_time(name, time));
    }
}
