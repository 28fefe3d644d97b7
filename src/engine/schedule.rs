//! Builds one step's batch: a token of every decoding sequence, and segments of prompts beside them.

use super::admit::Grown;
use super::chunk_boundary::{restart, segment_end};
use super::core::{Engine, pools};
use super::event::FinishReason;
use super::request::{PromptScores, RequestId};
use super::sequence::Sequence;
use crate::backend::{Batch, Capacity, DrawCapacity, OutputRow, Segment, StateCheckpoint};
use crate::cache::SlotRef;
use crate::error::{BackendError, EngineError, Error};
use crate::model::{StepOptions, TraceChoice};

/// A batch, and the sequence of each of its segments.
pub(super) struct Planned {
    pub(super) batch: Batch,
    pub(super) step_options: StepOptions,
    pub(super) segments: Vec<PlannedSegment>,
    /// The trace to write; the batch is then one token of one sequence.
    pub(super) trace: Option<PlannedTrace>,
    /// Whether it follows a step whose tokens are not known: states are written to spare slots.
    pub(super) ahead: bool,
    /// Whether decoding sequences have several tokens each, which run in the form of single ones.
    pub(super) stepwise: bool,
}

/// The trace of one token.
#[derive(Clone, Copy)]
pub(super) struct PlannedTrace {
    pub(super) choice: TraceChoice,
    /// Whether its operations are timed.
    pub(super) timed: bool,
    /// Whether its frame is an event; otherwise it is only for a write that is undone.
    pub(super) emitted: bool,
    /// Number of likely next tokens in the frame.
    pub(super) likely: usize,
}

impl Planned {
    /// A plan without segments.
    pub(super) fn new() -> Self {
        Self {
            batch: Batch::default(),
            step_options: StepOptions {
                candidates: 1,
                keep_rows: false,
                probe_hidden: false,
                draws: DrawCapacity::NONE,
            },
            segments: Vec::new(),
            trace: None,
            ahead: false,
            stepwise: false,
        }
    }

    /// The requests that an error of this batch concerns: the one whose token was refused, or all.
    pub(super) fn owners(&self, error: &Error) -> Vec<RequestId> {
        let refused = match error {
            Error::Backend(BackendError::TokenOutOfRange { position, .. }) => Some(*position),
            _ => None,
        };
        let mut first = 0;
        let mut owners = Vec::new();
        for (owner, segment) in self.segments.iter().zip(&self.batch.segments) {
            let tokens = first..first + segment.length;
            first = tokens.end;
            if refused.is_none_or(|position| tokens.contains(&position)) {
                owners.push(owner.id);
            }
        }
        owners
    }
}

/// One of this many traced tokens of a sequence is timed. A device times operations by waiting for each one, without a graph
/// of launches: on every token that would slow down the answer that it measures.
pub const TIMED_OF: usize = 16;

/// One segment of the batch.
pub(super) struct PlannedSegment {
    pub(super) id: RequestId,
    pub(super) sample: usize,
    /// The sequence's position after the segment.
    pub(super) end: usize,
    /// Its output rows in the batch: the first, and their number. The first of a proposal is that of `end`.
    pub(super) outputs: (usize, usize),
    /// The draws from the last of them in the batch: the first, and their number. A proposal has one from each.
    pub(super) draws: (usize, usize),
    /// Checkpoints inside it, ascending.
    pub(super) checkpoints: Vec<MidChunkCheckpoint>,
    /// Tokens after `end` that are verified.
    pub(super) proposed: Vec<u32>,
}

/// A checkpoint inside a segment.
pub(super) struct MidChunkCheckpoint {
    /// Its position in the sequence.
    pub(super) at: usize,
    /// The slot that the state is written to.
    pub(super) slot: SlotRef,
    /// Whether it is cached; otherwise it only restarts the recurrence.
    pub(super) keep: bool,
}

impl Engine {
    /// Builds the next batch; `None` if nothing runs.
    pub(super) async fn plan(&mut self) -> Result<Option<Planned>, Error> {
        self.grow_all().await?;
        let mut planned = Planned::new();
        if let Some(index) = self.next_traced() {
            let sequence = &mut self.running[index];
            let emitted = sequence.traced() && sequence.position >= sequence.reported;
            planned.trace = Some(PlannedTrace {
                choice: sequence.request.trace.unwrap_or_default(),
                timed: emitted && sequence.frames.is_multiple_of(TIMED_OF),
                emitted,
                likely: sequence.request.logprobs.unwrap_or(0),
            });
            sequence.frames += usize::from(emitted);
            let end = sequence.position + 1;
            let added = self.add(&mut planned, index, end, Vec::new())?;
            return Ok(added.then_some(planned));
        }
        let most = self.model.limits().step;
        let prefills = self.prefills();
        if !self
            .plan_decodes(&mut planned, !prefills.is_empty())
            .await?
        {
            return Ok(None);
        }
        if planned.stepwise {
            return Ok(Some(planned));
        }
        let first = self.first_in_order(&prefills);
        for index in prefills {
            let Some(end) = self.next_chunk_boundary(&planned, index, &most) else {
                continue;
            };
            let taken: usize = planned
                .segments
                .iter()
                .map(|segment| segment.checkpoints.len())
                .sum();
            let left = most.checkpoints - taken;
            match self.mid_chunk_checkpoints(index, end, left).await {
                Ok((end, checkpoints)) => {
                    if !self.add(&mut planned, index, end, checkpoints)? {
                        return Ok(None);
                    }
                }
                Err(error) => {
                    // The set of running sequences has changed: the next step builds another batch.
                    self.refuse(vec![self.running[index].id], error)?;
                    return Ok(None);
                }
            }
        }
        let runs = |id| {
            planned
                .segments
                .iter()
                .any(|segment| (segment.id, segment.sample) == id)
        };
        self.passed_over = first.is_some_and(|first| !runs(first));
        if planned.segments.is_empty() && !self.running.is_empty() {
            let (expected, found) = (
                self.options.cut + 1,
                most.tokens - most.segments.min(most.tokens),
            );
            return Err(Error::from(EngineError::StepTooSmall { expected, found }));
        }
        Ok((!planned.segments.is_empty()).then_some(planned))
    }

    /// The sequences whose prompts have tokens left, in the order in which they take tokens of the step: by priority, then the one
    /// with the least left first, so that a short prompt does not wait behind long ones. If the prompt that would be next by
    /// arrival had none of the last step for this reason, arrival decides.
    fn prefills(&self) -> Vec<usize> {
        let mut prefills: Vec<usize> = (0..self.running.len())
            .filter(|index| !self.running[*index].decodes() && !self.running[*index].alone())
            .collect();
        prefills.sort_by_key(|index| {
            let sequence = &self.running[*index];
            let (priority, arrival) = sequence.order();
            let left = sequence.prompt() - sequence.position;
            (priority, if self.passed_over { 0 } else { left }, arrival)
        });
        prefills
    }

    /// The first of these sequences by priority and arrival.
    fn first_in_order(&self, prefills: &[usize]) -> Option<(RequestId, usize)> {
        let sequences = prefills.iter().map(|index| &self.running[*index]);
        let first = sequences.min_by_key(|sequence| sequence.order())?;
        Some((first.id, first.sample))
    }

    /// The sequence whose token runs next, alone: sequences that are traced alternate with all others.
    fn next_traced(&mut self) -> Option<usize> {
        let traced = Sequence::alone;
        let others = self.running.iter().any(|sequence| !traced(sequence));
        let count = self
            .running
            .iter()
            .filter(|sequence| traced(sequence))
            .count();
        // After the last traced sequence all others have a step.
        if count == 0 || (others && self.traced >= count) {
            self.traced = 0;
            return None;
        }
        let index = self.traced % count;
        self.traced = index + 1;
        (0..self.running.len())
            .filter(|at| traced(&self.running[*at]))
            .nth(index)
    }

    /// Makes sure that all decoding sequences have blocks for their known tokens; some may be preempted.
    async fn grow_all(&mut self) -> Result<(), Error> {
        'again: loop {
            for index in 0..self.running.len() {
                if !self.running[index].decodes() {
                    continue;
                }
                match self.grow(index).await? {
                    Grown::Ready => {}
                    Grown::Again => continue 'again,
                    Grown::Never => {
                        let sequence = self.running.remove(index);
                        self.finish(sequence, FinishReason::Length);
                        continue 'again;
                    }
                }
            }
            return Ok(());
        }
    }

    /// The end of the next segment of a prompt, if the step has capacity for one.
    fn next_chunk_boundary(
        &self,
        planned: &Planned,
        index: usize,
        most: &Capacity,
    ) -> Option<usize> {
        let sequence = &self.running[index];
        let end = sequence.next_stop();
        let table: usize = planned
            .batch
            .segments
            .iter()
            .map(|segment| segment.blocks.len())
            .sum();
        let blocks = sequence.prompt().div_ceil(self.model.limits().block_tokens);
        if table + blocks > most.blocks {
            return None;
        }
        // A step has capacity for a whole segment in addition to all decodes.
        let prefilled: usize = planned
            .batch
            .segments
            .iter()
            .filter(|segment| segment.length > 1)
            .map(|segment| segment.length)
            .sum();
        let mut budget = (most.tokens - planned.batch.tokens.len()).min(
            (most.tokens - most.segments)
                .max(1)
                .saturating_sub(prefilled),
        );
        let outputs = most.outputs - planned.batch.outputs.len();
        if sequence.request.scores == PromptScores::None {
            budget = if outputs == 0 { 0 } else { budget };
        } else {
            budget = budget.min(outputs);
        }
        segment_end(sequence.position, end, budget, self.options.cut)
    }

    /// The checkpoints inside a segment, at most `left`, and the earlier end of the segment if a required one does not fit.
    async fn mid_chunk_checkpoints(
        &mut self,
        index: usize,
        end: usize,
        left: usize,
    ) -> Result<(usize, Vec<MidChunkCheckpoint>), Error> {
        let start = self.running[index].position;
        let mut taken = Vec::new();
        let mut end = end;
        if let Some(border) = restart(start, end, self.options.cut) {
            // A single token runs in the decode form; inside a longer segment it would not.
            let slot = if border == start + 1 || left == 0 {
                None
            } else {
                self.cache.free_slot()
            };
            match slot {
                Some(slot) => taken.push(MidChunkCheckpoint {
                    at: border,
                    slot,
                    keep: false,
                }),
                None => end = border,
            }
        }
        for at in self.wanted(index, end).into_iter().rev() {
            if let Some(inside) = taken.iter_mut().find(|inside| inside.at == at) {
                inside.keep = true;
            } else if taken.len() < left
                && let Some(slot) = self.cache.slot(&mut pools(&mut self.model)).await?
            {
                taken.push(MidChunkCheckpoint {
                    at,
                    slot,
                    keep: true,
                });
            }
        }
        taken.sort_unstable_by_key(|inside| inside.at);
        Ok((end, taken))
    }

    /// Optional checkpoints inside a segment: every few blocks, and at the last block boundary of the prompt, so that the
    /// same prompt need not be prefilled whole again. They are dropped if there are no slots for them.
    fn wanted(&self, index: usize, end: usize) -> Vec<usize> {
        let sequence = &self.running[index];
        if !sequence.request.cacheable() {
            return Vec::new();
        }
        let (start, prompt) = (sequence.position, &sequence.request.prompt);
        let block_tokens = self.model.limits().block_tokens;
        let every = self.options.checkpoint_blocks.max(1) * block_tokens;
        let last = (prompt.len() - 1) / block_tokens * block_tokens;
        let periodic = (start / every + 1..)
            .map(|i| i * every)
            .take_while(|at| *at < end);
        let mut wanted: Vec<usize> = periodic
            .chain((start < last && last < end).then_some(last))
            .collect();
        wanted.dedup();
        wanted.retain(|at| self.cache.find(sequence.tokens.prefix(*at)).is_none());
        wanted
    }

    /// Adds a sequence's tokens up to `end` to the batch. Returns whether it was added: a request whose grammar cannot be
    /// followed is refused, and the next step builds another batch.
    pub(super) fn add(
        &mut self,
        planned: &mut Planned,
        index: usize,
        end: usize,
        checkpoints: Vec<MidChunkCheckpoint>,
    ) -> Result<bool, Error> {
        let sequence = &mut self.running[index];
        let Some(allocation) = &sequence.allocation else {
            return Ok(true);
        };
        let (start, first) = (sequence.position, planned.batch.tokens.len());
        let blocks = end.div_ceil(self.model.limits().block_tokens);
        planned
            .batch
            .tokens
            .extend_from_slice(&sequence.tokens[start..end]);
        planned.batch.segments.push(Segment {
            length: end - start,
            position: start,
            slot_in: allocation.slot_in(),
            slot_out: allocation.slot.get(),
            checkpoints: checkpoints
                .iter()
                .map(|inside| StateCheckpoint {
                    after: inside.at - start,
                    slot: inside.slot.get(),
                })
                .collect(),
            blocks: allocation.blocks(blocks),
        });
        let outputs = planned.batch.outputs.len();
        let request = &sequence.request;
        if request.scores != PromptScores::None && start < sequence.prompt() {
            let target = |at: usize| request.prompt.get(at + 1).copied();
            let rows = (start..end).map(|at| OutputRow {
                row: first + at - start,
                target: target(at),
            });
            planned.batch.outputs.extend(rows);
        } else if end >= sequence.tokens.len() || sequence.alone() {
            planned.batch.outputs.push(OutputRow {
                row: first + end - start - 1,
                target: request.prompt.get(end).copied(),
            });
        }
        if planned.batch.outputs.len() > outputs {
            let step_options = &mut planned.step_options;
            let candidates = request.logprobs.unwrap_or(0);
            step_options.candidates = step_options.candidates.max(candidates);
            step_options.keep_rows |=
                request.scores == PromptScores::Logits && start < sequence.prompt();
        }
        let first_draw = planned.batch.draws.len();
        let answers = sequence.drawn_answers(end);
        if !answers.is_empty() {
            let row = planned.batch.outputs.len() - 1;
            match sequence.sampler.draws(row, answers, 0) {
                Ok(draws) => planned.batch.draws.extend(draws),
                Err(error) => {
                    let id = sequence.id;
                    self.refuse(vec![id], error)?;
                    return Ok(false);
                }
            }
        }
        planned.segments.push(PlannedSegment {
            id: sequence.id,
            sample: sequence.sample,
            end,
            outputs: (outputs, planned.batch.outputs.len() - outputs),
            draws: (first_draw, planned.batch.draws.len() - first_draw),
            checkpoints,
            proposed: Vec::new(),
        });
        Ok(true)
    }
}
