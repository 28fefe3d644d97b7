//! Submits a step before the tokens of the step before it are known, so that the device does not wait for the host.
//!
//! The tokens are fed on the device ([`Batch::fed`](crate::backend::Batch::fed)). Until a token is known, the state before it is
//! kept: the step writes to a spare slot, and if the token ends the answer, what the step computed for it is dropped. So an answer
//! and everything that is cached of it have the same bits as without.

use super::core::{Engine, pools};
use super::schedule::{Planned, PlannedSegment};
use super::sequence::Sequence;
use crate::backend::{FedToken, OutputRow, Segment, StepOutput, Ticket};
use crate::error::{Error, Scope};

/// A step that was submitted; its output has not been processed.
pub(super) struct Submitted {
    pub(super) planned: Planned,
    /// One, or one per layer.
    pub(super) tickets: Vec<Ticket<StepOutput>>,
}

impl Submitted {
    /// Waits for the device.
    pub(super) async fn output(&mut self) -> Result<StepOutput, Error> {
        // If the step runs in parts, the last part has the output; the other parts have completed by then.
        let mut output = StepOutput::default();
        for ticket in self.tickets.drain(..) {
            output = ticket.await?;
        }
        Ok(output)
    }
}

impl Engine {
    /// Submits the step after `step`, which was submitted and whose tokens are not known; `None` if that step has to wait for
    /// them.
    ///
    /// # Errors
    /// A device that failed. Any other error is left to the step that waits.
    pub(super) async fn submit_ahead(
        &mut self,
        step: &Planned,
    ) -> Result<Option<Submitted>, Error> {
        let device = |error: Error| match error.scope() {
            Scope::Device => Err(error),
            _ => Ok(None),
        };
        let planned = match self.plan_ahead(step).await {
            Ok(Some(planned)) => planned,
            Ok(None) => return Ok(None),
            Err(error) => return device(error),
        };
        match self.submit_planned(&planned) {
            Ok(tickets) => Ok(Some(Submitted { planned, tickets })),
            Err(error) => device(error),
        }
    }

    /// The tokens after those that `step` draws, if all running sequences decode and nothing else is to be done first.
    async fn plan_ahead(&mut self, step: &Planned) -> Result<Option<Planned>, Error> {
        if !self.options.async_scheduling
            || !self.model.backend().is_asynchronous()
            || step.trace.is_some()
            || !self.exports.is_empty()
            || self.may_admit()
        {
            return Ok(None);
        }
        let mut members = Vec::new();
        for segment in &step.segments {
            let Some(index) = segment.of(&self.running) else {
                // Its answer has ended.
                continue;
            };
            let sequence = &self.running[index];
            if !sequence.single
                || self.speculates(sequence)
                || !sequence.decodes()
                || sequence.alone()
                || !sequence.sampler.is_independent()
                || segment.draws.1 != 1
            {
                return Ok(None);
            }
            members.push((index, segment));
        }
        if members.len() < self.running.len() {
            return Ok(None);
        }
        let mut planned = Planned {
            ahead: true,
            ..Planned::new()
        };
        for (index, segment) in members {
            let sequence = &self.running[index];
            if sequence.ends_at(segment.end, self.context()) {
                continue;
            }
            if !self.reserve_ahead(index, segment.end + 1).await? {
                return Ok(None);
            }
            self.add_ahead(&mut planned, index, segment, step.ahead)?;
        }
        Ok((!planned.segments.is_empty()).then_some(planned))
    }

    /// Whether a waiting sequence might be admitted now, which needs to know what runs.
    fn may_admit(&self) -> bool {
        let Some(next) = self.waiting.front() else {
            return false;
        };
        let full = self.running.len() >= self.model.limits().step.segments;
        !full || self.longest(next.request.priority).is_some()
    }

    /// Makes sure that a sequence has a spare slot, and blocks for `tokens` tokens. Returns whether it has: no other sequence
    /// is preempted for it.
    pub(super) async fn reserve_ahead(
        &mut self,
        index: usize,
        tokens: usize,
    ) -> Result<bool, Error> {
        let needed = tokens.div_ceil(self.model.limits().block_tokens);
        let mut pools = pools(&mut self.model);
        let Some(allocation) = &mut self.running[index].allocation else {
            return Ok(false);
        };
        if allocation.spare.is_none() {
            allocation.spare = self.cache.slot(&mut pools).await?;
        }
        let missing = needed.saturating_sub(allocation.blocks.len());
        if missing > 0 {
            match self.cache.blocks(&mut pools, missing).await? {
                Some(mut fresh) => allocation.blocks.append(&mut fresh),
                None => return Ok(false),
            }
        }
        Ok(allocation.spare.is_some())
    }

    /// Adds the token that `before` draws for a sequence; `ahead` is whether the state before it is in the spare slot.
    fn add_ahead(
        &mut self,
        planned: &mut Planned,
        index: usize,
        before: &PlannedSegment,
        ahead: bool,
    ) -> Result<(), Error> {
        let sequence = &mut self.running[index];
        let Some((allocation, spare)) = sequence
            .allocation
            .as_ref()
            .and_then(|allocation| Some((allocation, allocation.spare.as_ref()?)))
        else {
            return Ok(());
        };
        let (slot, spare) = (allocation.slot.get(), spare.get());
        let (slot_in, slot_out) = if ahead { (spare, slot) } else { (slot, spare) };
        let (row, end) = (planned.batch.tokens.len(), before.end + 1);
        let blocks = end.div_ceil(self.model.limits().block_tokens);
        planned.batch.segments.push(Segment {
            length: 1,
            position: before.end,
            slot_in: Some(slot_in),
            slot_out,
            checkpoints: Vec::new(),
            blocks: allocation.blocks(blocks),
        });
        planned.batch.tokens.push(0);
        let draw = before.draws.0;
        planned.batch.fed.push(FedToken { row, draw });
        planned.batch.outputs.push(OutputRow { row, target: None });
        let candidates = sequence.request.logprobs.unwrap_or(0);
        let step_options = &mut planned.step_options;
        step_options.candidates = step_options.candidates.max(candidates);
        let answers = sequence.sample..sequence.sample + 1;
        let draws = sequence.sampler.draws(row, answers, 1)?;
        planned.batch.draws.extend(draws);
        planned.segments.push(PlannedSegment {
            id: sequence.id,
            sample: sequence.sample,
            end,
            outputs: (row, 1),
            draws: (row, 1),
            checkpoints: Vec::new(),
            proposed: Vec::new(),
        });
        Ok(())
    }
}

impl PlannedSegment {
    /// The index of its sequence among the running ones, if it still runs.
    pub(super) fn of(&self, running: &[Sequence]) -> Option<usize> {
        let own = |sequence: &Sequence| (sequence.id, sequence.sample) == (self.id, self.sample);
        running.iter().position(own)
    }
}
