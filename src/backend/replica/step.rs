//! A step of a replica: a step of one device, which is submitted as it is, or parts of several.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::NAME;
use super::store::check_there;
use super::tables::{TensorOn, Values};
use crate::backend::parts::step::{Part, PartsStep, StepOn, read, write};
use crate::backend::shared::{On, SharedBackend, Traffic};
use crate::backend::{Batch, Result, Step, StepOutput, Tensor, TensorValues, Ticket};
use crate::error::BackendError;

/// What runs it.
pub(super) enum Inner {
    /// One device, whose submission may return before the device has run it.
    Whole(StepOn),
    /// Several.
    Parts(Box<PartsStep>),
}

impl Inner {
    /// A single part of a single device needs nothing but that device's step.
    pub(super) fn of(mut parts: PartsStep) -> Self {
        if let [Part::Run { steps, .. }] = &mut parts.parts[..]
            && steps.len() == 1
            && let Some(step) = steps.pop()
        {
            return Self::Whole(step);
        }
        Self::Parts(Box::new(parts))
    }
}

/// A tensor with values of an earlier step, and the devices that read them.
pub(super) struct Before {
    pub(super) tensor: Tensor,
    pub(super) on: Vec<TensorOn>,
    /// Whether only batches with fed tokens need it: the drawn tokens.
    pub(super) fed: bool,
}

/// The probes of one tensor: that of the whole, then those of pieces of it.
pub(super) struct Probed {
    /// Width of the whole.
    pub(super) width: usize,
    /// The first column of each piece.
    pub(super) columns: Vec<usize>,
}

pub(super) struct ReplicaStep {
    pub(super) inner: Inner,
    /// The devices that run any of it.
    pub(super) devices: Vec<(usize, SharedBackend)>,
    /// The number of the homes that it was compiled for, and that of the present ones.
    pub(super) compiled_for: u64,
    pub(super) present: Arc<AtomicU64>,
    pub(super) before: Vec<Before>,
    /// Where the last values are of each tensor after it.
    pub(super) after: Vec<(Tensor, Vec<TensorOn>)>,
    pub(super) values: Arc<Mutex<Values>>,
    /// The probes of the program; empty if none is of pieces.
    pub(super) probes: Arc<[Probed]>,
    pub(super) traffic: Arc<Traffic>,
    /// All devices.
    pub(super) all: Vec<SharedBackend>,
}

impl ReplicaStep {
    /// Copies tensors with values of earlier steps to the devices that read them and have others.
    fn bring(&self, batch: &Batch) -> Result<()> {
        let mut values = self.values.lock().unwrap_or_else(PoisonError::into_inner);
        for Before { tensor, on, fed } in &self.before {
            if *fed && batch.fed.is_empty() {
                continue;
            }
            for to in on {
                let known = values.of(*tensor);
                let Some(from) = known.first().copied() else {
                    break;
                };
                if known.iter().any(|it| it.device == to.device) {
                    continue;
                }
                let [from, place] = [from, *to].map(|it| On {
                    backend: self.all[it.device].clone(),
                    tensor: it.tensor,
                });
                let rows = if *fed {
                    tensor.capacity
                } else {
                    place.rows(batch)
                };
                let moved = read(&from, rows, &self.traffic)?;
                write(&place, &moved, &self.traffic)?;
                values.add(*tensor, *to);
            }
        }
        Ok(())
    }

    /// Notes where the values of tensors are.
    fn leave(&self) {
        let mut values = self.values.lock().unwrap_or_else(PoisonError::into_inner);
        for (tensor, on) in &self.after {
            if values.of(*tensor) != on {
                values.set(*tensor, on.clone());
            }
        }
    }
}

impl Step for ReplicaStep {
    fn operations(&self) -> &[&'static str] {
        match &self.inner {
            Inner::Whole(whole) => whole.step.operations(),
            Inner::Parts(parts) => parts.operations(),
        }
    }

    fn time(&mut self, on: bool) -> Result<()> {
        match &mut self.inner {
            Inner::Whole(whole) => whole.step.time(on),
            Inner::Parts(parts) => parts.time(on),
        }
    }

    fn submit(&mut self, batch: &Batch) -> Result<Ticket<StepOutput>> {
        if self.present.load(Ordering::Acquire) != self.compiled_for {
            return Err(BackendError::Shape {
                operation: NAME,
                what: "the homes of its layers",
                expected: "those of when the step was compiled".to_owned(),
                found: "others since".to_owned(),
            });
        }
        for (device, backend) in &self.devices {
            check_there(backend, *device)?;
        }
        self.bring(batch)?;
        let ticket = match &mut self.inner {
            Inner::Whole(whole) => {
                let (backend, ticket) = (whole.backend.clone(), whole.submit(batch)?);
                let probes = Arc::clone(&self.probes);
                Ticket::new(async move {
                    let mut output = backend.noted(ticket.await)?;
                    join_probes(&mut output, &probes);
                    Ok(output)
                })
            }
            Inner::Parts(parts) => {
                let mut output = parts.submit(batch)?.wait()?;
                join_probes(&mut output, &self.probes);
                Ticket::ready(Ok(output))
            }
        };
        self.leave();
        Ok(ticket)
    }
}

/// Puts the pieces of each probe into the whole.
fn join_probes(output: &mut StepOutput, probes: &[Probed]) {
    if probes.is_empty() {
        return;
    }
    let mut found = std::mem::take(&mut output.probes).into_iter();
    for Probed { width, columns } in probes {
        let Some(mut whole) = found.next() else {
            return;
        };
        for (column, piece) in columns.iter().zip(&mut found) {
            put(&mut whole, &piece, *width, *column);
        }
        output.probes.push(whole);
    }
}

/// Puts the rows of a piece into those of the whole, `width` wide, from a column on.
pub(super) fn put(whole: &mut TensorValues, piece: &TensorValues, width: usize, column: usize) {
    let (TensorValues::F32(whole), TensorValues::F32(piece)) = (whole, piece) else {
        return;
    };
    let rows = whole.len() / width.max(1);
    let columns = piece.len() / rows.max(1);
    let rows = whole.chunks_exact_mut(width.max(1));
    for (row, piece) in rows.zip(piece.chunks_exact(columns.max(1))) {
        row[column..column + columns].copy_from_slice(piece);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_a_probe_are_put_into_the_whole_by_rows() {
        let f32s = |values: &[f32]| TensorValues::F32(values.to_vec());
        let mut output = StepOutput {
            probes: vec![
                TensorValues::Index(vec![7]),
                f32s(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
                f32s(&[20.0, 50.0]),
                f32s(&[30.0, 60.0]),
                f32s(&[9.0]),
            ],
            ..StepOutput::default()
        };
        let probed = |width, columns: &[usize]| Probed {
            width,
            columns: columns.to_vec(),
        };
        let probes = [probed(1, &[]), probed(3, &[1, 2]), probed(1, &[])];
        join_probes(&mut output, &probes);
        let expected = [
            TensorValues::Index(vec![7]),
            f32s(&[1.0, 20.0, 30.0, 4.0, 50.0, 60.0]),
            f32s(&[9.0]),
        ];
        assert_eq!(output.probes, expected);
    }
}
