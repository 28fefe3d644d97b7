//! A step of several devices: their steps, and between them what passes through the host's memory.

use std::sync::Arc;
use std::time::Instant;

use super::cut::Exchange;
use super::exchange;
use crate::backend::check::Demands;
use crate::backend::shared::{On, SharedBackend, Traffic};
use crate::backend::{Batch, Capacity, Leave, Result, Step, StepOutput, TensorValues, Ticket};
use crate::error::BackendError;

/// A step of one of the devices.
pub(in crate::backend) struct StepOn {
    pub(in crate::backend) backend: SharedBackend,
    pub(in crate::backend) step: Box<dyn Step>,
}

impl StepOn {
    /// Submits a batch, alone on the device.
    pub(in crate::backend) fn submit(&mut self, batch: &Batch) -> Result<Ticket<StepOutput>> {
        let device = self.backend.lock();
        let ticket = self.step.submit(batch);
        drop(device);
        self.backend.noted(ticket)
    }
}

/// A part of a step, compiled.
pub(in crate::backend) enum Part {
    /// The steps of some devices, which run the same operations.
    Run {
        steps: Vec<StepOn>,
        /// What ends the devices' parts in exchanges among themselves; empty without these.
        leaves: Vec<Leave>,
        /// Whether tokens are drawn in it.
        draws: bool,
    },
    /// An exchange, with its tensors on each device.
    Exchange {
        exchange: Exchange,
        /// What is read: the target, the parts, the experts' rows.
        from: Vec<On>,
        /// What is written.
        to: Vec<On>,
        /// The experts' ids, on a device that has them.
        experts: Option<On>,
    },
    /// Tensors, each with the places that it is copied to.
    Send(Vec<(On, Vec<On>)>),
}

impl Part {
    /// Everything that is read or written in an exchange.
    pub(in crate::backend) fn places(&self) -> Vec<&On> {
        match self {
            Self::Run { .. } => Vec::new(),
            Self::Exchange {
                from, to, experts, ..
            } => from.iter().chain(to).chain(experts).collect(),
            Self::Send(tensors) => {
                let both = tensors.iter();
                both.flat_map(|(from, to)| std::iter::once(from).chain(to))
                    .collect()
            }
        }
    }
}

pub(in crate::backend) struct PartsStep {
    pub(in crate::backend) traffic: Arc<Traffic>,
    pub(in crate::backend) capacity: Capacity,
    pub(in crate::backend) demands: Demands,
    pub(in crate::backend) parts: Vec<Part>,
    pub(in crate::backend) names: Vec<&'static str>,
    /// Whether a device may run a part while another one still runs a part before: a device's own parts follow each other, and
    /// what one needs of another is read when it is there.
    pub(in crate::backend) overlaps: bool,
    pub(in crate::backend) timed: bool,
}

impl Step for PartsStep {
    fn operations(&self) -> &[&'static str] {
        &self.names
    }

    fn time(&mut self, on: bool) -> Result<()> {
        for part in &mut self.parts {
            if let Part::Run { steps, .. } = part {
                let mut steps = steps.iter_mut();
                steps.try_for_each(|step| step.step.time(on))?;
            }
        }
        self.timed = on;
        Ok(())
    }

    fn submit(&mut self, batch: &Batch) -> Result<Ticket<StepOutput>> {
        self.demands.check(&self.capacity, batch)?;
        let mut run = Run {
            batch,
            undrawn: Batch {
                draws: Vec::new(),
                ..batch.clone()
            },
            overlaps: self.overlaps && !self.timed,
            running: Vec::new(),
            output: StepOutput::default(),
        };
        for part in &mut self.parts {
            let started = Instant::now();
            let name = match part {
                Part::Run {
                    steps,
                    leaves,
                    draws,
                } => {
                    run.steps(steps, leaves, *draws)?;
                    continue;
                }
                Part::Exchange {
                    exchange,
                    from,
                    to,
                    experts,
                } => {
                    let places = (&from[..], &to[..], experts.as_ref());
                    run_exchange(*exchange, places, batch, &self.traffic)?;
                    exchange.name()
                }
                Part::Send(tensors) => {
                    for (from, to) in tensors {
                        let values = read(from, from.rows(batch), &self.traffic)?;
                        to.iter()
                            .try_for_each(|to| write(to, &values, &self.traffic))?;
                    }
                    "send"
                }
            };
            if self.timed {
                let elapsed = started.elapsed().as_secs_f64();
                run.output.add_time(name, elapsed * 1e3);
            }
        }
        run.wait()?;
        Ok(Ticket::ready(Ok(run.output)))
    }
}

/// One submission.
struct Run<'a> {
    batch: &'a Batch,
    /// The batch without its draws, for parts that draw nothing.
    undrawn: Batch,
    overlaps: bool,
    /// Steps that were submitted and not awaited yet: for each part those of its devices.
    running: Vec<Vec<(SharedBackend, Ticket<StepOutput>)>>,
    /// Results so far.
    output: StepOutput,
}

impl Run<'_> {
    /// Submits to all devices of a part.
    fn steps(&mut self, steps: &mut [StepOn], leaves: &[Leave], draws: bool) -> Result<()> {
        let batch = if draws { self.batch } else { &self.undrawn };
        if !leaves.is_empty() {
            self.output.extend(exchange::run(steps, leaves, batch)?);
            return Ok(());
        }
        // The last ranks first: those of other nodes begin while the CPU of this one computes.
        let submit = |step: &mut StepOn| Ok((step.backend.clone(), step.submit(batch)?));
        let tickets = steps.iter_mut().rev().map(submit);
        let mut tickets = tickets.collect::<Result<Vec<_>>>()?;
        tickets.reverse();
        self.running.push(tickets);
        if self.overlaps { Ok(()) } else { self.wait() }
    }

    /// Waits for all steps, and keeps the output of each part's first device: the others' is the same.
    fn wait(&mut self) -> Result<()> {
        for tickets in std::mem::take(&mut self.running) {
            for (rank, (backend, ticket)) in tickets.into_iter().enumerate() {
                let found = backend.noted(ticket.wait())?;
                if rank == 0 {
                    self.output.extend(found);
                }
            }
        }
        Ok(())
    }
}

pub(in crate::backend) fn read(place: &On, rows: usize, traffic: &Traffic) -> Result<TensorValues> {
    traffic.add(rows * place.tensor.width);
    place.backend.noted(place.read(rows).wait())
}

pub(in crate::backend) fn write(
    place: &On,
    values: &TensorValues,
    traffic: &Traffic,
) -> Result<()> {
    traffic.add(match values {
        TensorValues::F32(values) => values.len(),
        TensorValues::Index(values) => values.len(),
    });
    place.write(values)
}

/// Reads the same rows of all places.
fn read_all(places: &[On], rows: usize, traffic: &Traffic) -> Result<Vec<Vec<f32>>> {
    let tickets: Vec<_> = places.iter().map(|place| place.read(rows)).collect();
    let tickets = places.iter().zip(tickets);
    let values = tickets.map(
        |(place, ticket)| match place.backend.noted(ticket.wait())? {
            TensorValues::F32(values) => {
                traffic.add(values.len());
                Ok(values)
            }
            TensorValues::Index(_) => Err(indices("the parts of an exchange")),
        },
    );
    values.collect()
}

fn indices(what: &'static str) -> BackendError {
    BackendError::Shape {
        operation: "several devices",
        what,
        expected: "numbers".to_owned(),
        found: "indices".to_owned(),
    }
}

fn run_exchange(
    exchange: Exchange,
    (from, to, experts): (&[On], &[On], Option<&On>),
    batch: &Batch,
    traffic: &Traffic,
) -> Result<()> {
    let Some(first) = from.first() else {
        return Ok(());
    };
    let count = first.rows(batch);
    let parts = read_all(from, count, traffic)?;
    let values = match exchange {
        Exchange::Sum(_) => sum(parts),
        Exchange::Gather(_) => gather(&parts, first.tensor.width),
        Exchange::Experts(op) => {
            let ids = match experts {
                Some(place) => read(place, count, traffic)?,
                None => TensorValues::Index(Vec::new()),
            };
            let ids = ids.as_index().unwrap_or_default();
            let (local, width) = (op.count / from.len(), op.rows.width / op.experts.width);
            choose(&parts, ids, local, width)
        }
    };
    let values = TensorValues::F32(values);
    to.iter().try_for_each(|to| write(to, &values, traffic))
}

/// The sum over ranks, added in rank order.
fn sum(parts: Vec<Vec<f32>>) -> Vec<f32> {
    let mut parts = parts.into_iter();
    let mut sums = parts.next().unwrap_or_default();
    for part in parts {
        let both = sums.iter_mut().zip(part);
        both.for_each(|(sum, value)| *sum += value);
    }
    sums
}

/// The rows' columns of all ranks, side by side; `width` of each.
fn gather(parts: &[Vec<f32>], width: usize) -> Vec<f32> {
    let rows = parts.first().map_or(0, Vec::len) / width.max(1);
    let rows = (0..rows).flat_map(|row| {
        let columns = row * width..(row + 1) * width;
        parts.iter().flat_map(move |part| &part[columns.clone()])
    });
    rows.copied().collect()
}

/// For each chosen expert the row, `width` wide, of the rank that has the expert; `local` of them on each.
fn choose(parts: &[Vec<f32>], ids: &[u32], local: usize, width: usize) -> Vec<f32> {
    let mut rows = Vec::with_capacity(ids.len() * width);
    for (choice, id) in ids.iter().enumerate() {
        // A damaged router may choose no expert: its weights are NaN, and any row will do.
        let rank = (*id as usize / local.max(1)).min(parts.len() - 1);
        rows.extend_from_slice(&parts[rank][choice * width..(choice + 1) * width]);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_added_in_rank_order() {
        // In another order the small number is lost.
        let parts = [1.0, -1.0, f32::EPSILON / 4.0].map(|value| vec![value; 2]);
        assert_eq!(sum(parts.to_vec()), [f32::EPSILON / 4.0; 2]);
    }

    #[test]
    fn columns_of_all_ranks_stand_side_by_side() {
        let parts = [vec![1.0, 2.0, 5.0, 6.0], vec![3.0, 4.0, 7.0, 8.0]];
        assert_eq!(gather(&parts, 2), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
        assert!(gather(&[Vec::new(), Vec::new()], 2).is_empty());
    }

    #[test]
    fn a_row_comes_from_the_rank_that_has_its_expert() {
        let parts = [vec![1.0, 1.5, 2.0, 2.5], vec![3.0, 3.5, 4.0, 4.5]];
        // Expert 5 is on the second of two ranks with four each, expert 0 on the first.
        assert_eq!(choose(&parts, &[5, 0], 4, 2), [3.0, 3.5, 2.0, 2.5]);
        assert_eq!(choose(&parts, &[u32::MAX, 3], 4, 2), [3.0, 3.5, 2.0, 2.5]);
    }
}
