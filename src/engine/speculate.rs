//! Speculation: a step verifies tokens that were looked up (`lookup.rs`), and keeps those that the model draws too.
//!
//! The step's rows are computed in the form of single tokens ([`Model::stepwise_step`](crate::model::Model::stepwise_step)),
//! and each draw has the random number of its position: where that form has the same bits for several tokens as for one, so
//! has the answer.
//!
//! A recurrent state cannot be rolled back. The step writes the state after the last known token to the spare slot, and the
//! one after all proposed tokens to the sequence's own. If the model draws other tokens, the sequence continues from the
//! first: what it drew instead, and the proposed tokens before, are known then, and run again with the next proposal. Latents
//! after them are overwritten.
//!
//! Verified tokens are handed out one per [`Engine::step`], without the device, so that stop strings, stop tokens and
//! cancellations end an answer where they would without speculation.

use std::collections::VecDeque;

use super::core::Engine;
use super::process_output::Rows;
use super::schedule::{Planned, PlannedSegment};
use super::sequence::Sequence;
use crate::backend::{Choice, Drawn, OutputRow, Segment, StateCheckpoint};
use crate::error::{Error, Scope};

/// Numbers of proposals and of their tokens so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Speculated {
    /// Proposals.
    pub drafts: u64,
    /// Proposed tokens.
    pub draft_tokens: u64,
    /// Proposed tokens that the model drew too.
    pub accepted_tokens: u64,
}

/// Tokens of one answer that were verified and not handed out yet.
#[derive(Default)]
pub(super) struct VerifiedRun {
    /// The row that each is drawn from, and the draw.
    rows: VecDeque<(Choice, Option<Drawn>)>,
    /// If the whole proposal was verified: the position after it, whose state is in the spare slot.
    end: Option<usize>,
}

/// What the decodes of a step leave of its capacity.
struct Room {
    tokens: usize,
    outputs: usize,
    checkpoints: usize,
    blocks: usize,
}

impl Engine {
    /// Numbers of proposals so far.
    #[must_use]
    pub fn speculated(&self) -> Speculated {
        self.speculated
    }

    /// Whether tokens are proposed for a sequence: it must be known how each is drawn before the tokens before it are.
    pub(super) fn speculates(&self, sequence: &Sequence) -> bool {
        self.options.prompt_lookup.is_some()
            && sequence.single
            && sequence.request.trace.is_none()
            && sequence.sampler.is_independent()
    }

    /// Adds the decoding sequences to the batch: the tokens that are known, usually one, and proposed ones unless `prompts`
    /// are to run. Returns `false` if the set of running sequences has changed: the next step builds another batch.
    pub(super) async fn plan_decodes(
        &mut self,
        planned: &mut Planned,
        prompts: bool,
    ) -> Result<bool, Error> {
        let running = self.running.iter().enumerate();
        let decodes: Vec<usize> = running
            .filter(|(_, sequence)| sequence.decodes() && !sequence.alone())
            .map(|(index, _)| index)
            .collect();
        let (mut room, ends) = self.room(&decodes);
        // Prompts run in another form than proposals, so they do not share a step; exports read states after it.
        let proposes = self.options.prompt_lookup.is_some() && !prompts && self.exports.is_empty();
        for (index, end) in decodes.into_iter().zip(ends) {
            let proposal = match proposes {
                true => self.proposal(index, end, &mut room).await?,
                false => Vec::new(),
            };
            planned.stepwise |= end + proposal.len() > self.running[index].position + 1;
            let added = match proposal.is_empty() {
                true => self.add(planned, index, end, Vec::new())?,
                false => self.add_proposed(planned, index, proposal)?,
            };
            if !added {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// What the decodes leave of a step's capacity, and the end of each one's known tokens, as many as fit.
    fn room(&self, decodes: &[usize]) -> (Room, Vec<usize>) {
        let most = self.model.limits().step;
        let mut room = Room {
            tokens: most.tokens.saturating_sub(decodes.len()),
            outputs: most.outputs.saturating_sub(decodes.len()),
            checkpoints: most.checkpoints,
            blocks: most.blocks,
        };
        let block_tokens = self.model.limits().block_tokens;
        let end = |index: &usize| {
            let sequence = &self.running[*index];
            let next = sequence.position + 1;
            let more = sequence.tokens.len().saturating_sub(next).min(room.tokens);
            room.tokens -= more;
            let blocks = (next + more).div_ceil(block_tokens);
            room.blocks = room.blocks.saturating_sub(blocks);
            next + more
        };
        let ends = decodes.iter().map(end).collect();
        (room, ends)
    }

    /// The tokens to propose for a sequence whose known tokens run up to `end`; none without a spare slot and blocks for
    /// them, as no other sequence is preempted for a proposal.
    async fn proposal(
        &mut self,
        index: usize,
        end: usize,
        room: &mut Room,
    ) -> Result<Vec<u32>, Error> {
        let sequence = &self.running[index];
        let known = sequence.tokens.len();
        let Some(lookup) = self
            .options
            .prompt_lookup
            .filter(|_| self.speculates(sequence) && end == known && room.checkpoints > 0)
        else {
            return Ok(Vec::new());
        };
        // One more token is drawn than is proposed, and none beyond what the answer may have.
        let drawn = known - sequence.prompt();
        let wanted = sequence.request.max_tokens.saturating_sub(drawn + 1);
        let most = wanted.min(self.context().saturating_sub(known));
        let most = most.min(room.tokens).min(room.outputs);
        let proposal = lookup.propose(&sequence.tokens, most).to_vec();
        if proposal.is_empty() {
            return Ok(proposal);
        }
        let block_tokens = self.model.limits().block_tokens;
        let after = known + proposal.len();
        let blocks = after.div_ceil(block_tokens) - known.div_ceil(block_tokens);
        let reserved = match self.reserve_ahead(index, after).await {
            Ok(reserved) => reserved && blocks <= room.blocks,
            // Without memory for a proposal the sequence decodes as without speculation.
            Err(error) if error.scope() != Scope::Device => false,
            Err(error) => return Err(error),
        };
        if !reserved {
            return Ok(Vec::new());
        }
        room.tokens -= proposal.len();
        room.outputs -= proposal.len();
        room.checkpoints -= 1;
        room.blocks -= blocks;
        Ok(proposal)
    }

    /// Adds a sequence's known tokens and a proposal to the batch, with a draw after the last known token and after each
    /// proposed one. Returns whether they were added.
    fn add_proposed(
        &mut self,
        planned: &mut Planned,
        index: usize,
        proposal: Vec<u32>,
    ) -> Result<bool, Error> {
        let sequence = &mut self.running[index];
        let Some((allocation, spare)) = sequence
            .allocation
            .as_ref()
            .and_then(|allocation| Some((allocation, allocation.spare.as_ref()?)))
        else {
            return Ok(true);
        };
        let (start, known) = (sequence.position, sequence.tokens.len());
        let (end, batch) = (known + proposal.len(), &mut planned.batch);
        let last = batch.tokens.len() + known - start - 1;
        batch.tokens.extend_from_slice(&sequence.tokens[start..]);
        batch.tokens.extend_from_slice(&proposal);
        batch.segments.push(Segment {
            length: end - start,
            position: start,
            slot_in: allocation.slot_in(),
            slot_out: allocation.slot.get(),
            checkpoints: vec![StateCheckpoint {
                after: known - start,
                slot: spare.get(),
            }],
            blocks: allocation.blocks(end.div_ceil(self.model.limits().block_tokens)),
        });
        let (first_output, first_draw) = (batch.outputs.len(), batch.draws.len());
        let answers = sequence.sample..sequence.sample + 1;
        for ahead in 0..=proposal.len() {
            let row = last + ahead;
            let draws = sequence
                .sampler
                .draws(first_output + ahead, answers.clone(), ahead as u64);
            match draws {
                Ok(draws) => batch.draws.extend(draws),
                Err(error) => {
                    let id = sequence.id;
                    self.refuse(vec![id], error)?;
                    return Ok(false);
                }
            }
            batch.outputs.push(OutputRow { row, target: None });
        }
        let candidates = sequence.request.logprobs.unwrap_or(0);
        let step_options = &mut planned.step_options;
        step_options.candidates = step_options.candidates.max(candidates);
        let rows = proposal.len() + 1;
        planned.segments.push(PlannedSegment {
            id: sequence.id,
            sample: sequence.sample,
            end: known,
            outputs: (first_output, rows),
            draws: (first_draw, rows),
            checkpoints: Vec::new(),
            proposed: proposal,
        });
        Ok(true)
    }

    /// Verifies the proposal of a segment, if it has one. Returns the row after the last known token; the sequence keeps
    /// those after it for [`Engine::take_verified`].
    pub(super) fn verify<'a>(
        &mut self,
        index: usize,
        segment: &PlannedSegment,
        rows: Rows<'a>,
    ) -> Rows<'a> {
        let proposed = &segment.proposed;
        if proposed.is_empty() {
            return rows;
        }
        let accepted = accepted(proposed, &rows);
        self.speculated.drafts += 1;
        self.speculated.draft_tokens += proposed.len() as u64;
        self.speculated.accepted_tokens += accepted as u64;
        let sequence = &mut self.running[index];
        sequence.use_spare();
        let drawn = rows.choices.iter().cloned().zip(rows.draws.iter().copied());
        sequence.verified = VerifiedRun {
            rows: drawn.take(accepted + 1).skip(1).collect(),
            end: (accepted == proposed.len()).then_some(segment.end + accepted),
        };
        Rows {
            choices: &rows.choices[..1],
            logits: &[],
            draws: &rows.draws[..1],
        }
    }

    /// Hands out the next verified token of each sequence that has some. Returns whether any had.
    pub(super) fn take_verified(&mut self) -> bool {
        let with = |sequence: &&Sequence| !sequence.verified.rows.is_empty();
        let owners: Vec<_> = self.running.iter().filter(with).collect();
        let owners: Vec<_> = owners.iter().map(|one| (one.id, one.sample)).collect();
        for owner in &owners {
            let mut running = self.running.iter();
            let Some(index) = running.position(|one| (one.id, one.sample) == *owner) else {
                continue;
            };
            let Some((choice, drawn)) = self.running[index].next_verified() else {
                continue;
            };
            let sequence = self.running.remove(index);
            self.continue_with(index, sequence, &choice, drawn);
        }
        !owners.is_empty()
    }
}

impl Sequence {
    /// The next verified row and its draw. With the last of a whole proposal the sequence is at its end.
    fn next_verified(&mut self) -> Option<(Choice, Option<Drawn>)> {
        let next = self.verified.rows.pop_front()?;
        if self.verified.rows.is_empty()
            && let Some(end) = self.verified.end.take()
        {
            self.use_spare();
            self.position = end;
        }
        Some(next)
    }
}

/// The number of proposed tokens that were drawn too, from the first on. A row that is not finite verifies nothing: it is
/// computed again when its tokens are known, and reported then.
fn accepted(proposed: &[u32], rows: &Rows<'_>) -> usize {
    let drawn = rows.draws.iter().zip(rows.choices.iter().skip(1));
    proposed
        .iter()
        .zip(drawn)
        .take_while(|(token, (drawn, next))| {
            next.finite && drawn.is_some_and(|drawn| drawn.token == **token)
        })
        .count()
}
