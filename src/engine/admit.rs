//! Admission: by priority, then first come, first served, as long as there are slots and blocks; and preemption when there are none.
//!
//! A preempted sequence is copied to host memory whole and resumes with the same bits.

use super::core::{Engine, pools};
use super::sequence::Sequence;
use crate::error::{EngineError, Error};

impl Engine {
    /// Admits waiting sequences in their order, until the next one does not fit.
    pub(super) async fn admit(&mut self) -> Result<(), Error> {
        let most = self.model.limits().step.segments;
        let mut yielded = false;
        if !self.waiting.is_empty() {
            // A waiting sequence needs a slot more than a running one a spare.
            for allocation in self.running.iter_mut().flat_map(|one| &mut one.allocation) {
                allocation.spare = None;
            }
        }
        while let Some(mut sequence) = self.waiting.pop_front() {
            // Imports take no part in a step yet.
            if self.running.len() < most || sequence.import.is_some() {
                match self.allocate(&mut sequence, false).await {
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
            let priority = sequence.request.priority;
            self.waiting.push_front(sequence);
            if self.running.is_empty() {
                // If no sequence runs, only what waiting sequences hold on the device can occupy it.
                self.waiting_to_host().await?;
                let Some(mut sequence) = self.waiting.pop_front() else {
                    break;
                };
                match self.allocate(&mut sequence, true).await {
                    Ok(true) => self.placed(sequence),
                    Ok(false) if !self.incoming.is_empty() => {
                        // Slots and blocks that are reserved for imports become free when these have run, or are given up.
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
            } else if !yielded && let Some(index) = self.longest(priority) {
                yielded = true;
                let arrival = self.arrival();
                self.running[index].arrival = arrival;
                self.preempt(index).await?;
            } else {
                break;
            }
        }
        Ok(())
    }

    /// The sequence that has generated the most tokens since its admission, if it has had its share, of those that do not run
    /// before a request of this priority.
    pub(super) fn longest(&self, priority: i64) -> Option<usize> {
        let longest = (0..self.running.len())
            .filter(|index| self.running[*index].request.priority >= priority)
            .max_by_key(|index| self.running[*index].served_tokens)?;
        (self.running[longest].served_tokens >= self.options.quantum).then_some(longest)
    }

    /// Starts a sequence that has its slot and blocks.
    fn placed(&mut self, sequence: Sequence) {
        if sequence.import.is_some() {
            self.reserved(sequence);
        } else {
            self.running.push(sequence);
        }
    }

    /// Allocates a sequence its slot and the blocks for the whole prompt. If nothing else runs (`alone`) and there are still
    /// too few, the prefix that it would continue from is moved off the device first.
    async fn allocate(&mut self, sequence: &mut Sequence, alone: bool) -> Result<bool, Error> {
        let prompt = sequence.tokens.prefix(sequence.request.reusable());
        let fresh = sequence.position == 0;
        let caching = fresh && sequence.request.prefix_caching_enabled();
        if let Some(tokens) = sequence.import.filter(|_| caching) {
            sequence.prefix = self.cache.latents(sequence.tokens.prefix(tokens));
            sequence.cached = sequence.prefix.position;
        } else if caching {
            while let Some(hit) = self.cache.lookup(prompt) {
                // The checkpoint may be evicted between the lookup and the reference; then the next deepest is looked up.
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
            // A waiting sequence holds nothing.
            sequence.release();
            sequence.position = 0;
        } else if fresh && sequence.import.is_none() {
            sequence.cached = sequence.position;
        }
        sequence.served_tokens = 0;
        sequence.allocation = allocation;
        Ok(sequence.allocation.is_some())
    }

    /// Moves off the device what waiting sequences hold there, and what is held for export streams.
    pub(super) async fn waiting_to_host(&mut self) -> Result<(), Error> {
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

    /// Preempts a running sequence: it leaves the device and waits in its order.
    pub(super) async fn preempt(&mut self, index: usize) -> Result<(), Error> {
        let mut sequence = self.running.remove(index);
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

    /// Makes sure that the sequence at `index` has blocks for its known tokens. Returns whether it still runs.
    pub(super) async fn grow(&mut self, index: usize) -> Result<Grown, Error> {
        let block_tokens = self.model.limits().block_tokens;
        let sequence = &self.running[index];
        let known = sequence.tokens.len().max(sequence.position + 1);
        let needed = known.div_ceil(block_tokens);
        let has = self.running[index]
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
                    self.refuse(vec![self.running[index].id], error)?;
                    return Ok(Grown::Again);
                }
            };
            if let Some(mut fresh) = fresh {
                if let Some(allocation) = &mut self.running[index].allocation {
                    allocation.blocks.append(&mut fresh);
                }
                return Ok(Grown::Ready);
            }
            // The last sequence in order is preempted, even if it is this one.
            let last = (0..self.running.len())
                .max_by_key(|index| self.running[*index].order())
                .unwrap_or(index);
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
                self.preempt(index).await?;
                return Ok(Grown::Again);
            }
            self.waiting_to_host().await?;
        }
    }
}

/// The result of a request for a block.
pub(super) enum Grown {
    /// The sequence has the block.
    Ready,
    /// A sequence was preempted, this one or another, or this one failed: the set of running sequences has changed.
    Again,
    /// The pool is too small for the sequence.
    Never,
}
