//! A step of a group: the ranks' steps, and between them what passes through the host's memory.

use std::sync::Arc;
use std::time::Instant;

use super::exchange;
use super::lower::Exchange;
use crate::backend::check::Demands;
use crate::backend::shared::{On, Traffic};
use crate::backend::{Batch, Capacity, Leave, Result, Step, StepOutput, TensorValues, Ticket};
use crate::error::BackendError;

/// A part of a step, compiled.
pub(super) enum Part {
    /// The steps of the ranks of a stage.
    Run {
        steps: Vec<Box<dyn Step>>,
        /// What ends the ranks' parts in exchanges among themselves; empty without these.
        leaves: Vec<Leave>,
        /// Whether tokens are drawn in it.
        draws: bool,
    },
    /// An exchange, with its tensors on each rank of the stage.
    Exchange {
        exchange: Exchange,
        /// What is read: the target, the parts, the experts' rows.
        from: Vec<On>,
        /// What is written.
        to: Vec<On>,
        /// The experts' ids, on the first rank.
        experts: Option<On>,
    },
    /// Tensors of a stage, each with the places that it is copied to.
    Send(Vec<(On, Vec<On>)>),
}

impl Part {
    /// Everything that is read or written in an exchange.
    pub(super) fn places(&self) -> Vec<&On> {
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

pub(super) struct GroupStep {
    pub(super) traffic: Arc<Traffic>,
    pub(super) capacity: Capacity,
    pub(super) demands: Demands,
    pub(super) parts: Vec<Part>,
    pub(super) names: Vec<&'static str>,
    pub(super) timed: bool,
}

impl Step for GroupStep {
    fn operations(&self) -> &[&'static str] {
        &self.names
    }

    fn time(&mut self, on: bool) -> Result<()> {
        for part in &mut self.parts {
            if let Part::Run { steps, .. } = part {
                steps.iter_mut().try_for_each(|step| step.time(on))?;
            }
        }
        self.timed = on;
        Ok(())
    }

    fn submit(&mut self, batch: &Batch) -> Result<Ticket<StepOutput>> {
        self.demands.check(&self.capacity, batch)?;
        let undrawn = Batch {
            draws: Vec::new(),
            ..batch.clone()
        };
        let mut output = StepOutput::default();
        for part in &mut self.parts {
            match part {
                Part::Run {
                    steps,
                    leaves,
                    draws,
                } => {
                    let batch = if *draws { batch } else { &undrawn };
                    if leaves.is_empty() {
                        run(steps, batch, &mut output)?;
                    } else {
                        output.extend(exchange::run(steps, leaves, batch)?);
                    }
                }
                Part::Exchange {
                    exchange,
                    from,
                    to,
                    experts,
                } => {
                    let started = Instant::now();
                    let places = (&from[..], &to[..], experts.as_ref());
                    run_exchange(*exchange, places, batch, &self.traffic)?;
                    if self.timed {
                        output.add_time(exchange.name(), started.elapsed().as_secs_f64() * 1e3);
                    }
                }
                Part::Send(tensors) => {
                    let started = Instant::now();
                    for (from, to) in tensors {
                        let values = read(from, from.rows(batch), &self.traffic)?;
                        to.iter()
                            .try_for_each(|to| write(to, &values, &self.traffic))?;
                    }
                    if self.timed {
                        output.add_time("send", started.elapsed().as_secs_f64() * 1e3);
                    }
                }
            }
        }
        Ok(Ticket::ready(Ok(output)))
    }
}

/// Submits to all ranks of a stage, waits for all, and keeps the first one's output: the others' is the same.
fn run(steps: &mut [Box<dyn Step>], batch: &Batch, output: &mut StepOutput) -> Result<()> {
    // The last ranks first: those of other nodes begin while the CPU of this one computes.
    let tickets = steps.iter_mut().rev().map(|step| step.submit(batch));
    let tickets = tickets.collect::<Result<Vec<_>>>()?;
    for (rank, ticket) in tickets.into_iter().rev().enumerate() {
        let found = ticket.wait()?;
        if rank == 0 {
            output.extend(found);
        }
    }
    Ok(())
}

fn read(place: &On, rows: usize, traffic: &Traffic) -> Result<TensorValues> {
    traffic.add(rows * place.tensor.width);
    place.read(rows).wait()
}

fn write(place: &On, values: &TensorValues, traffic: &Traffic) -> Result<()> {
    traffic.add(match values {
        TensorValues::F32(values) => values.len(),
        TensorValues::Index(values) => values.len(),
    });
    place.write(values)
}

/// Reads the same rows of all places.
fn read_all(places: &[On], rows: usize, traffic: &Traffic) -> Result<Vec<Vec<f32>>> {
    let tickets: Vec<_> = places.iter().map(|place| place.read(rows)).collect();
    let values = tickets.into_iter().map(|ticket| match ticket.wait()? {
        TensorValues::F32(values) => {
            traffic.add(values.len());
            Ok(values)
        }
        TensorValues::Index(_) => Err(indices("the parts of an exchange")),
    });
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
