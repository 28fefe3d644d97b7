//! Ranks that exchange results without the host: they join each other once, and their steps run at the same time.

use std::sync::mpsc::channel;
use std::sync::{Mutex, PoisonError};
use std::thread;

use super::step::StepOn;
use crate::backend::shared::SharedBackend;
use crate::backend::{Batch, Collectives, Leave, Result, StepOutput, Ticket};
use crate::error::BackendError;

/// Joins the ranks of each stage, `width` of them, if all devices exchange results by themselves; `None` if results pass through
/// the host's memory. The results end the parts of the ranks, in their order.
///
/// # Errors
/// A device that cannot reach the others.
pub(in crate::backend) fn join(
    ranks: &[SharedBackend],
    width: usize,
) -> Result<Option<Vec<Leave>>> {
    // A device that is named twice would wait for itself.
    if width == 1 || ranks.chunks(width).any(has_a_device_twice) {
        return Ok(None);
    }
    for rank in ranks {
        match rank.lock().collectives()? {
            Collectives::Ready => {}
            Collectives::Never => return Ok(None),
            Collectives::Missing(reason) => {
                tracing::warn!("{reason}");
                return Ok(None);
            }
        }
    }
    let mut leaves = Vec::with_capacity(ranks.len());
    for stage in ranks.chunks(width) {
        leaves.extend(join_stage(stage)?);
    }
    tracing::info!(ranks = width, "devices exchange results without the host");
    Ok(Some(leaves))
}

fn has_a_device_twice(stage: &[SharedBackend]) -> bool {
    let mut devices: Vec<usize> = stage
        .iter()
        .map(|rank| rank.lock().device().index)
        .collect();
    devices.sort_unstable();
    devices.dedup();
    devices.len() < stage.len()
}

/// Joins the ranks of a stage, each on a thread of its own. If one fails, the others may wait for it for ever: they are left to
/// themselves, and the model cannot run.
fn join_stage(stage: &[SharedBackend]) -> Result<Vec<Leave>> {
    let Some(first) = stage.first() else {
        return Ok(Vec::new());
    };
    let id = first.lock().collective_id()?;
    let (sender, results) = channel();
    for (index, rank) in stage.iter().enumerate() {
        let (rank, ranks, sender) = (rank.clone(), stage.len(), sender.clone());
        let join = move || {
            let joined = rank.lock().join(id, index, ranks);
            // Nobody listens any more if another one failed.
            drop(sender.send((index, joined)));
        };
        let started = thread::Builder::new().spawn(join);
        started.map_err(|error| BackendError::Driver {
            backend: super::NAME,
            what: "a thread for each device".to_owned(),
            reason: error.to_string(),
        })?;
    }
    drop(sender);
    let mut leaves = Vec::with_capacity(stage.len());
    for (index, joined) in results {
        leaves.push((index, joined?));
    }
    leaves.sort_by_key(|(index, _)| *index);
    Ok(leaves.into_iter().map(|(_, leave)| leave).collect())
}

/// Ends the parts of all ranks when it is dropped.
struct Ending<'a>(&'a [Leave]);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.iter().for_each(|leave| leave());
    }
}

/// Runs the steps of a stage whose ranks have joined, each on a thread of its own; the first rank's output, which is that of all.
/// A rank that fails, in whatever way, ends the parts of all, so that none waits for it.
///
/// # Errors
/// [`BackendError::Lost`] with the first error: the devices exchange nothing any more.
pub(super) fn run(steps: &mut [StepOn], leaves: &[Leave], batch: &Batch) -> Result<StepOutput> {
    let failed = Mutex::new(None);
    let run = |rank: usize, step: &mut StepOn| {
        let ending = Ending(leaves);
        match step.step.submit(batch).and_then(Ticket::wait) {
            Ok(output) => {
                std::mem::forget(ending);
                Some(output)
            }
            Err(error) => {
                let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                failed.get_or_insert((rank, error));
                None
            }
        }
    };
    let outputs: Vec<_> = thread::scope(|scope| {
        let run = &run;
        let threads: Vec<_> = steps
            .iter_mut()
            .enumerate()
            .map(|(rank, step)| scope.spawn(move || run(rank, step)))
            .collect();
        threads.into_iter().map(|thread| thread.join()).collect()
    });
    let mut first = None;
    for output in outputs {
        let output = output.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        first = first.or(output);
    }
    let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    match (failed, first) {
        (None, Some(output)) => Ok(output),
        (None, None) => Ok(StepOutput::default()),
        (Some((rank, error)), _) => Err(lost(rank, error)),
    }
}

/// The error of a rank, after which all devices of the group are lost.
fn lost(rank: usize, error: BackendError) -> BackendError {
    match error {
        BackendError::Lost { .. } => error,
        other => BackendError::Lost {
            backend: "group's",
            reason: format!("the others do not wait for rank {rank}, which failed: {other}"),
        },
    }
}
