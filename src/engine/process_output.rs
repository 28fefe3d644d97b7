//! Processes the output of a step: positions, checkpoints, tokens, and complete answers.

use std::sync::Arc;

use super::core::{Engine, pools};
use super::event::{Event, Scored};
use super::hand_off::DrawnToken;
use super::request::PromptScores;
use super::sampling::Sampler;
use super::schedule::{Planned, PlannedSegment};
use super::sequence::{Sequence, likeliest};
use crate::backend::{Choice, Drawn, StepOutput};
use crate::cache::{Cache, StateSource};
use crate::error::Error;
use crate::model::Model;

/// The output rows of one segment.
pub(super) struct Rows<'a> {
    pub(super) choices: &'a [Choice],
    /// `[rows, vocabulary]`; empty if no logits were read back.
    pub(super) logits: &'a [f32],
    /// The token of each of its answers, drawn from the last row; with a proposal the token that is drawn from each row.
    pub(super) draws: &'a [Option<Drawn>],
}

/// Caches a sequence's state: its slot becomes the checkpoint's, and the sequence continues in another slot, if one is free.
pub(super) async fn cache_state(
    cache: &mut Cache,
    model: &mut Model,
    sequence: &mut Sequence,
) -> Result<(), Error> {
    let tokens = sequence.tokens.prefix(sequence.position);
    if cache.find(tokens).is_some() {
        return Ok(());
    }
    let Some(fresh) = cache.slot(&mut pools(model)).await? else {
        return Ok(());
    };
    let Some(allocation) = &mut sequence.allocation else {
        return Ok(());
    };
    if cache.store(tokens, &allocation.blocks, &allocation.slot) {
        allocation.state = StateSource::Shared(std::mem::replace(&mut allocation.slot, fresh));
    }
    Ok(())
}

impl Engine {
    pub(super) async fn process_output(
        &mut self,
        planned: Planned,
        output: StepOutput,
    ) -> Result<(), Error> {
        let vocabulary = self.model.config().vocab_size;
        let mut damaged = None;
        for segment in planned.segments {
            let (id, (first, count)) = (segment.id, segment.outputs);
            let (first_draw, draws) = segment.draws;
            let rows = Rows {
                choices: &output.choices[first..first + count],
                logits: if output.logits.is_empty() {
                    &[]
                } else {
                    &output.logits[first * vocabulary..(first + count) * vocabulary]
                },
                draws: &output.draws[first_draw..first_draw + draws],
            };
            let Some(index) = segment.of(&self.running) else {
                continue;
            };
            if planned.ahead {
                self.running[index].use_spare();
            }
            let rows = self.verify(index, &segment, rows);
            let finite = rows.choices.iter().all(|choice| choice.finite);
            let mut taken = self.moved(index, segment, finite).await;
            if !finite {
                damaged = Some(id);
            } else if taken.is_ok() {
                taken = self.take_rows(index, &rows).await;
            }
            taken.or_else(|error| self.refuse(vec![id], error))?;
        }
        match damaged {
            Some(id) => {
                let located = self.locate_non_finite(id).await;
                located.or_else(|error| self.refuse(vec![id], error))
            }
            None => Ok(()),
        }
    }

    /// Moves the sequence to the segment's end: its state is in its own slot, and the wanted checkpoints are cached.
    async fn moved(
        &mut self,
        index: usize,
        segment: PlannedSegment,
        keep: bool,
    ) -> Result<(), Error> {
        let sequence = &mut self.running[index];
        let (start, end) = (sequence.position, segment.end);
        sequence.position = end;
        let Some(allocation) = &mut sequence.allocation else {
            return Ok(());
        };
        allocation.state = StateSource::Own;
        for inside in &segment.checkpoints {
            if keep && inside.keep {
                let tokens = sequence.tokens.prefix(inside.at);
                self.cache.store(tokens, &allocation.blocks, &inside.slot);
            }
        }
        self.exports
            .moved(&mut self.model, sequence.id, end, allocation);
        if start < sequence.prompt() {
            let (id, cached) = (sequence.id, sequence.cached);
            if keep
                && self.running[index]
                    .checkpoint_here(&self.options, self.model.limits().block_tokens)
            {
                let sequence = &mut self.running[index];
                cache_state(&mut self.cache, &mut self.model, sequence).await?;
            }
            if end > self.running[index].reported {
                self.emit(id, Event::Prefill { done: end, cached });
            }
        }
        Ok(())
    }

    async fn take_rows(&mut self, index: usize, rows: &Rows<'_>) -> Result<(), Error> {
        let sequence = &self.running[index];
        if rows.choices.is_empty() {
            return Ok(());
        }
        let first = sequence.position - rows.choices.len();
        if sequence.request.scores != PromptScores::None && first < sequence.prompt() {
            let logprob = |choice: &Choice| {
                choice
                    .target_logit
                    .map(|logit| logit - choice.log_normaliser)
            };
            let logits = if sequence.request.scores == PromptScores::Logits {
                rows.logits.to_vec()
            } else {
                Vec::new()
            };
            let most = sequence.request.logprobs.unwrap_or(0);
            let top = rows.choices.iter().map(|choice| likeliest(choice, most));
            let scored = Scored {
                first,
                top: top.collect(),
                logprobs: rows.choices.iter().map(logprob).collect(),
                logits,
            };
            let id = sequence.id;
            let (scored, end) = (scored.after(sequence.scored), sequence.position);
            let reported = &mut self.running[index].scored;
            *reported = end.max(*reported);
            if let Some(scored) = scored {
                self.emit(id, Event::Scored(scored));
            }
        }
        let sequence = &self.running[index];
        // Nothing is drawn from the row of a token whose successor is known, as it was drawn before.
        if !sequence.decodes() || sequence.position < sequence.tokens.len() {
            return Ok(());
        }
        let last = rows.choices.len() - 1;
        let choice = &rows.choices[last];
        let sequence = self.running.remove(index);
        if !sequence.single {
            let first = |engine: &mut Self, answer: Sequence| {
                let drawn = rows.draws.get(answer.sample).copied().flatten();
                engine.take_token(answer, choice, drawn)
            };
            return self.fork(sequence, first).await;
        }
        let drawn = rows.draws.first().copied().flatten();
        self.continue_with(index, sequence, choice, drawn);
        Ok(())
    }

    /// Appends the token that was drawn for the sequence that ran at `index`, which runs on unless its answer is complete.
    pub(super) fn continue_with(
        &mut self,
        index: usize,
        sequence: Sequence,
        choice: &Choice,
        drawn: Option<Drawn>,
    ) {
        let id = sequence.id;
        match self.take_token(sequence, choice, drawn) {
            Ok(Some(sequence)) => self.running.insert(index.min(self.running.len()), sequence),
            Ok(None) => {}
            Err(error) => self.fail(id, &Arc::new(error)),
        }
    }

    /// Forks several answers from one prompt: each continues from the prompt's shared state in a slot of its own. `first`
    /// gives each its first token, and returns `None` for an answer that is complete; if it fails, the request fails.
    pub(super) async fn fork(
        &mut self,
        mut sequence: Sequence,
        mut first: impl FnMut(&mut Self, Sequence) -> Result<Option<Sequence>, Error>,
    ) -> Result<(), Error> {
        if let Err(error) = self.suspend(&mut sequence).await {
            self.enqueue(sequence);
            return Err(error);
        }
        let request = Arc::clone(&sequence.request);
        for sample in (0..request.samples).rev() {
            let (request, tokens) = (Arc::clone(&request), sequence.tokens.clone());
            let (id, arrival) = (sequence.id, sequence.arrival);
            let sampler = Sampler::of(&request, &self.vocabulary)?;
            let mut answer = Sequence::new(id, request, tokens, sample, arrival, sampler);
            answer.single = true;
            answer.position = sequence.position;
            answer.cached = sequence.cached;
            answer.prefix = sequence.prefix.clone();
            match first(self, answer) {
                Ok(Some(answer)) => self.enqueue(answer),
                Ok(None) => {}
                // One answer's error ends the request: the others are not started.
                Err(error) => {
                    self.fail(sequence.id, &Arc::new(error));
                    break;
                }
            }
        }
        Ok(())
    }

    /// Appends the token that was drawn for a sequence; `None` if the answer is complete.
    fn take_token(
        &mut self,
        mut sequence: Sequence,
        choice: &Choice,
        drawn: Option<Drawn>,
    ) -> Result<Option<Sequence>, Error> {
        let drawn = sequence.take_drawn(choice, drawn)?;
        let (id, sample) = (sequence.id, sequence.sample);
        let exports = &mut self.exports;
        let hand_off = exports.drawn(&mut self.model, id, sample, drawn.as_ref());
        if let Some(hand_off) = hand_off {
            self.emit(id, Event::HandOff(hand_off));
        }
        Ok(self.accept(sequence, drawn))
    }

    /// Appends a token to a sequence; `None` if the answer is complete.
    pub(super) fn accept(
        &mut self,
        mut sequence: Sequence,
        token: Option<DrawnToken>,
    ) -> Option<Sequence> {
        let (event, reason) = sequence.take(token, self.context());
        if let Some(event) = event {
            self.emit(sequence.id, event);
        }
        match reason {
            Some(reason) => {
                self.finish(sequence, reason);
                None
            }
            None => Some(sequence),
        }
    }
}
