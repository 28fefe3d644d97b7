//! One answer in progress: its tokens and its position.

use std::sync::Arc;

use super::event::{Event, FinishReason, TokenLogprobs, Usage};
use super::hand_off::DrawnToken;
use super::options::EngineOptions;
use super::request::{Request, RequestId};
use super::sampling::Sampler;
use super::speculate::VerifiedRun;
use crate::backend::{Choice, Drawn};
use crate::cache::{Allocation, HashedTokens, PrefixHandle};
use crate::error::{EngineError, Error};

/// One answer of a request.
pub(super) struct Sequence {
    pub(super) id: RequestId,
    pub(super) sample: usize,
    pub(super) request: Arc<Request>,
    /// Its order in the waiting queue: lower values first.
    pub(super) arrival: u64,
    /// Prompt and answer.
    pub(super) tokens: HashedTokens,
    /// Number of tokens that have been computed, so that their state and latents are held. In an answer that is all of them but
    /// the last, or fewer after a proposal of which some were not drawn.
    pub(super) position: usize,
    /// Whether it is a single answer and no other will be forked from it.
    pub(super) single: bool,
    /// Positions in the prompt where a segment always ends.
    cuts: Vec<usize>,
    /// Tokens that came from the cache.
    pub(super) cached: usize,
    /// For an import: the tokens whose caches come from another engine. It runs when all have come.
    pub(super) import: Option<usize>,
    /// The stop token that ended it.
    pub(super) stop_token: Option<u32>,
    /// Tokens generated since it was placed.
    pub(super) served_tokens: usize,
    /// Tokens that were computed before they had to be computed again: their progress and traces were reported.
    pub(super) reported: usize,
    /// Tokens of the prompt whose scores were reported.
    pub(super) scored: usize,
    /// Number of tokens that were traced.
    pub(super) frames: usize,
    /// Tokens that were verified and are handed out one after the other.
    pub(super) verified: VerifiedRun,
    /// What it holds while it waits.
    pub(super) prefix: PrefixHandle,
    /// What it holds while it runs.
    pub(super) allocation: Option<Allocation>,
    pub(super) sampler: Sampler,
}

impl Sequence {
    /// The answer number `sample` of a request; `sampler` is that of its first token.
    pub(super) fn new(
        id: RequestId,
        request: Arc<Request>,
        tokens: HashedTokens,
        sample: usize,
        arrival: u64,
        sampler: Sampler,
    ) -> Self {
        Self {
            id,
            sample,
            arrival,
            tokens,
            position: 0,
            single: request.samples == 1,
            cuts: request.cuts(),
            cached: 0,
            import: None,
            stop_token: None,
            served_tokens: 0,
            reported: 0,
            scored: 0,
            frames: 0,
            verified: VerifiedRun::default(),
            prefix: PrefixHandle::default(),
            allocation: None,
            sampler,
            request,
        }
    }

    /// Frees all that it holds.
    pub(super) fn release(&mut self) {
        self.allocation = None;
        self.verified = VerifiedRun::default();
        self.prefix = PrefixHandle::default();
    }

    /// Ends a segment of its prompt at a position from now on.
    pub(super) fn cut_at(&mut self, position: usize) {
        if position > 0 && !self.cuts.contains(&position) {
            self.cuts.push(position);
            self.cuts.sort_unstable();
        }
    }

    /// Number of answers that will be forked from it.
    pub(super) fn answers(&self) -> usize {
        if self.single { 1 } else { self.request.samples }
    }

    /// Its order among others: by priority, then by arrival. Lower values first.
    pub(super) fn order(&self) -> (i64, u64) {
        (self.request.priority, self.arrival)
    }

    /// Tokens of the prompt.
    pub(super) fn prompt(&self) -> usize {
        self.request.prompt.len()
    }

    /// Whether the prompt has been computed.
    pub(super) fn decodes(&self) -> bool {
        self.position >= self.prompt()
    }

    /// Whether its next token is traced.
    pub(super) fn traced(&self) -> bool {
        let from = self.request.trace_from.unwrap_or(usize::MAX);
        self.request.trace.is_some() && (self.decodes() || self.position >= from)
    }

    /// Whether its next token's writes are undone.
    pub(super) fn undoes(&self) -> bool {
        !self.decodes()
            && self
                .request
                .undo
                .iter()
                .any(|write| write.token == self.position)
    }

    /// Whether its next token runs alone.
    pub(super) fn alone(&self) -> bool {
        self.traced() || self.undoes()
    }

    /// The latest end of its next segment: the next cut, the start of its trace, a token whose writes are undone, or the
    /// prompt's end.
    pub(super) fn next_stop(&self) -> usize {
        let from = self
            .request
            .trace
            .and(self.request.trace_from)
            .filter(|from| *from > self.position);
        let cut = self.cuts.iter().copied().find(|cut| *cut > self.position);
        let undo = self.request.undo.iter().map(|write| write.token);
        let undo = undo.filter(|token| *token > self.position);
        [from, cut]
            .into_iter()
            .flatten()
            .chain(undo)
            .fold(self.prompt(), usize::min)
    }

    /// Whether to checkpoint its present position: at a cut, every few blocks, at the last whole block of the prompt, and at
    /// its end.
    pub(super) fn checkpoint_here(&self, options: &EngineOptions, block_tokens: usize) -> bool {
        let at = self.position;
        let last = (self.prompt() - 1) / block_tokens * block_tokens;
        self.request.cacheable()
            && (at == self.prompt()
                || at == last
                || at.is_multiple_of(options.checkpoint_blocks.max(1) * block_tokens)
                || self.cuts.contains(&at))
    }

    pub(super) fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.prompt(),
            cached_tokens: self.cached,
            generated_tokens: self.tokens.len() - self.prompt(),
        }
    }

    /// Takes over the token that was drawn for it; `None` if the request wants no tokens.
    ///
    /// # Errors
    /// A draw that allowed no token.
    pub(super) fn take_drawn(
        &mut self,
        choice: &Choice,
        drawn: Option<Drawn>,
    ) -> Result<Option<DrawnToken>, Error> {
        if self.request.max_tokens == 0 {
            return Ok(None);
        }
        let Some(Drawn { token, logit }) = drawn else {
            let reason = "it allows no token that the model has".to_owned();
            return Err(Error::from(EngineError::Grammar { reason }));
        };
        self.sampler.take(token)?;
        let logprobs = self.request.logprobs.map(|top| TokenLogprobs {
            logprob: logit - choice.log_normaliser,
            top: likeliest(choice, top),
        });
        Ok(Some(DrawnToken {
            id: token,
            logprobs,
        }))
    }

    /// Whether the answer ends with the token after position `end`, whichever it is.
    pub(super) fn ends_at(&self, end: usize, context: usize) -> bool {
        let generated = end + 1 - self.prompt();
        generated >= self.request.max_tokens || end >= context
    }

    /// Its state is in the spare slot from now on, and its slot becomes the spare.
    pub(super) fn use_spare(&mut self) {
        if let Some(allocation) = &mut self.allocation
            && let Some(spare) = &mut allocation.spare
        {
            std::mem::swap(&mut allocation.slot, spare);
        }
    }

    /// The answers whose next token is drawn from the row after position `end`: none before the last known token.
    pub(super) fn drawn_answers(&self, end: usize) -> std::ops::Range<usize> {
        if end < self.tokens.len() || self.request.max_tokens == 0 {
            0..0
        } else if self.single {
            self.sample..self.sample + 1
        } else {
            0..self.request.samples
        }
    }

    /// Appends a sampled token. Returns its event, and whether the answer ends there.
    pub(super) fn take(
        &mut self,
        drawn: Option<DrawnToken>,
        context: usize,
    ) -> (Option<Event>, Option<FinishReason>) {
        let Some(DrawnToken { id, logprobs, .. }) = drawn else {
            return (None, Some(FinishReason::Length));
        };
        self.served_tokens += 1;
        if self.request.stop_ids.contains(&id) {
            self.stop_token = Some(id);
            return (None, Some(FinishReason::Stop));
        }
        self.tokens.push(id);
        let full = self.tokens.len() - self.prompt() >= self.request.max_tokens
            || self.tokens.len() > context;
        let reason = if self.sampler.is_complete() {
            Some(FinishReason::Stop)
        } else {
            full.then_some(FinishReason::Length)
        };
        let token = Event::Token {
            sample: self.sample,
            id,
            logprobs,
        };
        (Some(token), reason)
    }
}

/// The best `most` candidates of a row with their log-probabilities.
pub(super) fn likeliest(choice: &Choice, most: usize) -> Vec<(u32, f32)> {
    let candidates = choice.candidates.iter().take(most);
    candidates
        .map(|(id, logit)| (*id, logit - choice.log_normaliser))
        .collect()
}
