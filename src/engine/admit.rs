//! Who runs: first come, first served, as long as there are slots and blocks; and who makes room when there are not.
//!
//! A sequence that makes room goes to host memory whole and comes back as it was, bit for bit.

use super::core::{Engine, pools};
use super::sequence::Sequence;
use crate::error::{EngineError, Error};

impl Engine {
    /// Lets waiting sequences in, in their order of arrival, until the next one does not fit.
    pub(super) async fn admit(&mut self) -> Result<(), Error> {
        let most = self.model.limits().step.segments;
        let mut yielded = false;
        while let Some(mut sequence) = self.waiting.pop_front() {
            // Caches that are to come take no part in a step yet.
            if self.running.len() < most || sequence.import.is_some() {
                match self.place(&mut sequence, false).await {
                    Ok(true) => {
                        self.placed(sequence);
                        continue;
                    }
                    Ok(false) => {}
                    Err(error) => {
                        let id = sequence.id;
                        self.waiting.push_front(sequence);
                        self.refuse(vec![id], error)?;
                        continue;
                    }
                }
            }
            self.waiting.push_front(sequence);
            if self.running.is_empty() {
                // What those that wait hold on the device is all that can be in the way.
                self.waiting_to_host().await?;
                let Some(mut sequence) = self.waiting.pop_front() else {
                    break;
                };
                match self.place(&mut sequence, true).await {
                    Ok(true) => self.placed(sequence),
                    Ok(false) if !self.incoming.is_empty() => {
                        // Places that are reserved for caches come free when these are there, or are given up.
                        self.waiting.push_front(sequence);
                        self.stalled = true;
                        break;
                    }
                    placed => {
                        let tokens = sequence.tokens.len();
                        let not_placed = |_| Error::from(EngineError::DoesNotFit { tokens });
                        let error = placed.map_or_else(|error| error, not_placed);
                        let id = sequence.id;
                        self.waiting.push_front(sequence);
                        self.refuse(vec![id], error)?;
                    }
                }
            } else if !yielded && let Some(place) = self.longest() {
                yielded = true;
                let arrival = self.arrival();
                self.running[place].arrival = arrival;
                self.preempt(place).await?;
            } else {
                break;
            }
        }
        Ok(())
    }

    /// The sequence that has generated most since it was placed, if it has had its share.
    fn longest(&self) -> Option<usize> {
        let longest =
            (0..self.running.len()).max_by_key(|place| self.running[*place].served_tokens)?;
        (self.running[longest].served_tokens >= self.options.quantum).then_some(longest)
    }

    /// A sequence has its slot and blocks.
    fn placed(&mut self, sequence: Sequence) {
        if sequence.import.is_some() {
            self.reserved(sequence);
        } else {
            self.running.push(sequence);
        }
    }

    /// Gives a sequence its slot and the blocks for what it is to run next: all of a prompt. Where it is `alone`, and not
    /// even then was there room, what it goes on from is taken off the device first.
    async fn place(&mut self, sequence: &mut Sequence, alone: bool) -> Result<bool, Error> {
        let prompt = sequence.tokens.prefix(sequence.request.reusable());
        let fresh = sequence.position == 0;
        let caching = fresh && sequence.request.prefix_caching_enabled();
        if let Some(tokens) = sequence.import.filter(|_| caching) {
            sequence.prefix = self.cache.latents(sequence.tokens.prefix(tokens));
            sequence.cached = sequence.prefix.position;
        } else if caching {
            while let Some(hit) = self.cache.lookup(prompt) {
                // Between finding and holding it may have gone: the next deepest is looked for then.
                if let Some(prefix) = self
                    .cache
                    .acquire(&mut pools(&mut self.model), &hit)
                    .await?
                {
                    sequence.position = prefix.position;
                    sequence.prefix = prefix;
                    break;
                }
            }
        }
        if alone {
            self.cache
                .to_host(&mut pools(&mut self.model), &mut sequence.prefix)
                .await?;
        }
        let blocks = sequence
            .tokens
            .len()
            .div_ceil(self.model.limits().block_tokens);
        let allocation = self
            .cache
            .place(&mut pools(&mut self.model), &mut sequence.prefix, blocks)
            .await?;
        if allocation.is_none() && fresh {
            // It holds nothing while it waits.
            sequence.release();
            sequence.position = 0;
        } else if fresh && sequence.import.is_none() {
            sequence.cached = sequence.position;
        }
        sequence.served_tokens = 0;
        sequence.allocation = allocation;
        Ok(sequence.allocation.is_some())
    }

    /// Takes what those that wait hold off the device, and what is held for streams of caches.
    async fn waiting_to_host(&mut self) -> Result<(), Error> {
        self.exports.offload(&mut self.model);
        let mut refused = Vec::new();
        for sequence in &mut self.waiting {
            let mut pools = pools(&mut self.model);
            let moved = self.cache.to_host(&mut pools, &mut sequence.prefix).await;
            refused.extend(moved.err().map(|error| (sequence.id, error)));
        }
        let mut refused = refused.into_iter();
        refused.try_for_each(|(id, error)| self.refuse(vec![id], error))
    }

    /// Takes a running sequence off the device; it waits in its order of arrival.
    pub(super) async fn preempt(&mut self, place: usize) -> Result<(), Error> {
        let mut sequence = self.running.remove(place);
        let mut suspended = self.suspend(&mut sequence).await;
        if suspended.is_ok() {
            let mut pools = pools(&mut self.model);
            suspended = self
                .cache
                .to_host(&mut pools, &mut sequence.prefix)
                .await
                .map_err(Error::from);
        }
        self.preemptions += 1;
        let id = sequence.id;
        self.enqueue(sequence);
        suspended.or_else(|error| self.refuse(vec![id], error))
    }

    /// Sees to it that the sequence at `place` has a block for its next token. Returns whether it still runs.
    pub(super) async fn grow(&mut self, place: usize) -> Result<Grown, Error> {
        let block_tokens = self.model.limits().block_tokens;
        let needed = (self.running[place].position + 1).div_ceil(block_tokens);
        let has = self.running[place]
            .allocation
            .as_ref()
            .map_or(0, |allocation| allocation.blocks.len());
        if has >= needed {
            return Ok(Grown::Ready);
        }
        loop {
            let mut pools = pools(&mut self.model);
            let fresh = match self.cache.blocks(&mut pools, needed - has).await {
                Ok(fresh) => fresh,
                Err(error) => {
                    self.refuse(vec![self.running[place].id], error)?;
                    return Ok(Grown::Again);
                }
            };
            if let Some(mut fresh) = fresh {
                if let Some(allocation) = &mut self.running[place].allocation {
                    allocation.blocks.append(&mut fresh);
                }
                return Ok(Grown::Ready);
            }
            // The last to arrive makes room, be it this one.
            let last = (0..self.running.len())
                .max_by_key(|place| self.running[*place].arrival)
                .unwrap_or(place);
            if self.running.len() > 1 {
                self.preempt(last).await?;
                return Ok(Grown::Again);
            }
            let mut waiting = self.waiting.iter();
            if !waiting.any(|sequence| sequence.prefix.is_on_device())
                && !self.exports.is_on_device()
            {
                if self.incoming.is_empty() {
                    return Ok(Grown::Never);
                }
                self.preempt(place).await?;
                return Ok(Grown::Again);
            }
            self.waiting_to_host().await?;
        }
    }
}

/// What became of a sequence that needs a block.
pub(super) enum Grown {
    /// It has it.
    Ready,
    /// Another was taken off the device, or it was itself, or it failed: look again at who runs.
    Again,
    /// The pool is too small for it.
    Never,
}
