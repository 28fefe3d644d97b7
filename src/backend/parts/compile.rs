//! Compiles the parts of a step on their ranks.

use super::cut::{Exchange, Part, Sent};
use super::step::{self, StepOn};
use crate::backend::shared::{On, SharedBackend};
use crate::backend::{Capacity, Leave, Op, Program, Result, Tensor};

/// What the compiler of parts asks of a backend of several devices.
pub(in crate::backend) trait Ranks {
    /// The backend of a rank.
    fn backend(&self, rank: usize) -> SharedBackend;

    /// Operations on the handles of a rank.
    fn program(&mut self, ops: &[Op], rank: usize) -> Result<Program>;

    /// A tensor on a rank.
    fn on(&mut self, rank: usize, tensor: Tensor) -> Result<On>;

    /// Whether each rank of a stage has a part of a tensor's columns.
    fn is_split(&self, _tensor: Tensor) -> Result<bool> {
        Ok(false)
    }

    /// What ends the parts of these ranks in exchanges among themselves; empty if they leave exchanges to the host.
    fn leaves(&self, _ranks: &[usize]) -> Vec<Leave> {
        Vec::new()
    }
}

/// Compiles parts, and adds the names of their operations.
///
/// # Errors
/// Those of the ranks' backends.
pub(in crate::backend) fn compile(
    parts: Vec<Part>,
    ranks: &mut dyn Ranks,
    capacity: Capacity,
    names: &mut Vec<&'static str>,
) -> Result<Vec<step::Part>> {
    let parts = parts.into_iter();
    let compiled = parts.map(|part| compile_part(part, ranks, capacity, names));
    compiled.collect()
}

fn compile_part(
    part: Part,
    ranks: &mut dyn Ranks,
    capacity: Capacity,
    names: &mut Vec<&'static str>,
) -> Result<step::Part> {
    match part {
        Part::Run { ranks: run, ops } => {
            let mut steps = Vec::with_capacity(run.len());
            for rank in &run {
                let program = ranks.program(&ops, *rank)?;
                let backend = ranks.backend(*rank);
                let step = backend.lock().compile(&program, capacity);
                let step = backend.noted(step)?;
                steps.push(StepOn { backend, step });
            }
            let first = steps.first().map(|first| first.step.operations());
            names.extend(first.unwrap_or_default());
            Ok(step::Part::Run {
                steps,
                leaves: ranks.leaves(&run),
                draws: ops.iter().any(|op| matches!(op, Op::Sample(_))),
            })
        }
        Part::Exchange { exchange, from, to } => {
            names.push(exchange.name());
            let (read, written) = exchange.tensors();
            let experts = match (exchange, from.first()) {
                (Exchange::Experts(op), Some(first)) => Some(ranks.on(*first, op.experts)?),
                _ => None,
            };
            Ok(step::Part::Exchange {
                exchange,
                from: on_all(ranks, &from, read)?,
                to: on_all(ranks, &to, written)?,
                experts,
            })
        }
        Part::Send(tensors) => {
            names.push("send");
            let mut sent = Vec::new();
            for it in tensors {
                sent.extend(compile_send(&it, ranks)?);
            }
            Ok(step::Part::Send(sent))
        }
    }
}

/// The places that a tensor is copied from and to: of one that is split, from each rank to its counterpart.
fn compile_send(sent: &Sent, ranks: &mut dyn Ranks) -> Result<Vec<(On, Vec<On>)>> {
    let tensor = sent.tensor;
    if !ranks.is_split(tensor)? {
        let first = &sent.holders[..sent.holders.len().min(1)];
        let from = on_all(ranks, first, tensor)?.into_iter();
        let to = on_all(ranks, &sent.to, tensor)?;
        return Ok(from.map(|from| (from, to.clone())).collect());
    }
    let pairs = sent.holders.iter().zip(&sent.to);
    let pairs = pairs.map(|(from, to)| {
        let from = ranks.on(*from, tensor)?;
        Ok((from, vec![ranks.on(*to, tensor)?]))
    });
    pairs.collect()
}

/// A tensor on some ranks.
fn on_all(ranks: &mut dyn Ranks, on: &[usize], tensor: Tensor) -> Result<Vec<On>> {
    on.iter().map(|rank| ranks.on(*rank, tensor)).collect()
}
