//! Receives caches: the request waits for a slot and blocks like any other, layers come in any order, and the sequence runs
//! when all have come. Until then no step waits for it, and if it is given up everything is freed.
//!
//! The caches are the states at the end of the header's tokens, and the latents; leading whole blocks of latents that are
//! cached here need not be sent. An import that has its slot and blocks needs no more of them until its sequence runs, so a
//! request that waits for reserved blocks waits only for the sender.

use std::sync::Arc;

use super::core::{Engine, pools};
use super::event::Event;
use super::hand_off::HandOff;
use super::process_output::cache_state;
use super::request::{Request, RequestId};
use super::sampling::Sampler;
use super::sequence::Sequence;
use crate::backend::Shard;
use crate::cache::{Assembled, CacheHeader, CacheLayout, StateSource};
use crate::error::{CacheError, EngineError, Error};

impl Engine {
    /// The pools that caches are loaded into.
    #[must_use]
    pub fn cache_layout(&self) -> CacheLayout {
        CacheLayout {
            states: self.model.states().layout,
            latents: self.model.latents().layout,
            shard: Shard::WHOLE,
        }
    }

    /// The formats of the model's weights, by name.
    #[must_use]
    pub fn weight_formats(&self) -> String {
        self.model.weight_formats()
    }

    /// The model and tokens of a prompt's caches, as this engine computes them.
    #[must_use]
    pub fn cache_header(&self, tokens: Vec<u32>) -> CacheHeader {
        CacheHeader {
            model: self.fingerprint,
            tokens,
        }
    }

    /// Queues a request that continues from caches which another engine sends. Its prompt begins with the tokens of `header`.
    /// It waits for a slot and blocks for the whole prompt in order of arrival; [`Event::Reserved`] reports these, and from
    /// which token on latents are needed. Then call [`Engine::load_layer`] for each layer and [`Engine::start_import`].
    ///
    /// # Errors
    /// A request that cannot run or has writes to undo, or caches of another model or of other tokens.
    pub fn import(
        &mut self,
        id: RequestId,
        request: Request,
        header: &CacheHeader,
    ) -> Result<(), Error> {
        self.check(id, &request)?;
        if !request.undo.is_empty() {
            return Err(EngineError::UndoTransfer.into());
        }
        let mismatch = |what: &str, expected: String, found: String| CacheError::Mismatch {
            what: what.to_owned(),
            expected,
            found,
        };
        if header.model != self.fingerprint {
            let (expected, found) = (self.fingerprint.to_string(), header.model.to_string());
            return Err(mismatch("model", expected, found).into());
        }
        let (prompt, position) = (&request.prompt, header.tokens.len());
        if position == 0 || !prompt.starts_with(&header.tokens) {
            let expected = format!("the first of the prompt's {}", prompt.len());
            let found = format!("{position} tokens");
            return Err(mismatch("tokens", expected, found).into());
        }
        Ok(self.enqueue_new(id, request, Some(position))?)
    }

    /// An import has its slot and blocks.
    pub(super) fn reserved(&mut self, sequence: Sequence) {
        let have = sequence.cached;
        self.emit(sequence.id, Event::Reserved { have });
        self.incoming.push(sequence);
    }

    /// Writes one layer of imported caches to the slot and blocks reserved for them.
    ///
    /// # Errors
    /// A request that was given up, or a device that fails.
    pub fn load_layer(&mut self, id: RequestId, part: &Assembled) -> Result<(), Error> {
        let incoming = self.incoming.iter().find(|incoming| incoming.id == id);
        let held = incoming.and_then(|incoming| incoming.allocation.as_ref());
        let held = held.ok_or(EngineError::UnknownImport { id: id.0 })?;
        let pools = pools(&mut self.model);
        match part {
            Assembled::State { layer, record } => {
                let slot = held.slot.get();
                pools
                    .backend
                    .write_state(&pools.states, *layer, slot, record)?;
            }
            Assembled::Latents {
                layer,
                block,
                record,
            } => {
                let block = held.blocks[*block].get();
                pools
                    .backend
                    .write_latents(&pools.latents, *layer, block, record)?;
            }
        }
        Ok(())
    }

    /// Starts the sequence once all layers have come; it waits if the maximum number of sequences runs. If the caches are
    /// those of the whole prompt, each answer begins with its token of `hand_off`, as if it had been sampled here, and
    /// continues with the hand-off's sampling. The prompt's state is cached as after a prefill.
    ///
    /// # Errors
    /// A request that was given up; a hand-off that does not fit the request, is missing, or is not expected; or a device
    /// that fails.
    pub async fn start_import(
        &mut self,
        id: RequestId,
        hand_off: Option<&HandOff>,
    ) -> Result<(), Error> {
        let index = self.incoming.iter().position(|incoming| incoming.id == id);
        let index = index.ok_or(EngineError::UnknownImport { id: id.0 })?;
        let (request, tokens) = (&self.incoming[index].request, self.incoming[index].import);
        let (tokens, prompt) = (tokens.unwrap_or(0), request.prompt.len());
        if hand_off.is_some() != (tokens == prompt) {
            let handed = hand_off.is_some();
            return Err(EngineError::HandOffMisplaced {
                tokens,
                prompt,
                handed,
            }
            .into());
        }
        if let Some(hand_off) = hand_off {
            hand_off.check(request, self.model.config().vocab_size)?;
        }
        let request = match hand_off {
            Some(hand_off) => Arc::new(Request {
                sampling: hand_off.sampling.clone(),
                ..(**request).clone()
            }),
            None => Arc::clone(request),
        };
        let sampler = Sampler::of(&request, &self.vocabulary)?;
        let incoming = self.incoming.remove(index);
        // Tokens that were not computed here but cached here.
        let (done, cached) = (tokens, incoming.cached);
        let mut sequence = ready_sequence(incoming, tokens, request, sampler);
        self.emit(id, Event::Prefill { done, cached });
        if sequence.checkpoint_here(&self.options, self.model.limits().block_tokens)
            && let Err(error) = cache_state(&mut self.cache, &mut self.model, &mut sequence).await
        {
            self.enqueue(sequence);
            return Err(error);
        }
        let Some(hand_off) = hand_off else {
            return self.run_or_wait(sequence).await;
        };
        if !sequence.single {
            let first = |engine: &mut Self, answer| engine.begin(answer, hand_off);
            return self.fork(sequence, first).await;
        }
        match self.begin(sequence, hand_off) {
            Ok(Some(sequence)) => self.run_or_wait(sequence).await,
            Ok(None) => Ok(()),
            Err(error) => {
                self.fail(id, &Arc::new(error));
                Ok(())
            }
        }
    }

    /// Starts an answer with the token that another engine sampled for it.
    fn begin(
        &mut self,
        mut sequence: Sequence,
        hand_off: &HandOff,
    ) -> Result<Option<Sequence>, Error> {
        let token = hand_off.first.get(sequence.sample).cloned().flatten();
        let token = token.filter(|_| sequence.request.max_tokens > 0);
        if let Some(token) = &token {
            sequence.sampler.take(token.id)?;
        }
        Ok(self.accept(sequence, token))
    }

    /// Runs a sequence that has its slot and blocks, or queues it if the maximum number of sequences runs.
    async fn run_or_wait(&mut self, mut sequence: Sequence) -> Result<(), Error> {
        if self.running.len() < self.model.limits().step.segments {
            self.running.push(sequence);
            return Ok(());
        }
        let suspended = self.suspend(&mut sequence).await;
        self.enqueue(sequence);
        suspended
    }

    /// Ends an import with the reason why its caches do not come.
    ///
    /// # Errors
    /// A request that does not wait for caches.
    pub fn fail_import(&mut self, id: RequestId, error: Error) -> Result<(), EngineError> {
        let mut importing = self.waiting.iter().chain(&self.incoming);
        if !importing.any(|sequence| sequence.id == id && sequence.import.is_some()) {
            return Err(EngineError::UnknownImport { id: id.0 });
        }
        self.fail(id, &Arc::new(error));
        Ok(())
    }

    /// Gives up an import: the request prefills its prompt here, in its order of arrival.
    ///
    /// # Errors
    /// A request that does not wait for caches.
    pub fn recompute_import(&mut self, id: RequestId) -> Result<(), EngineError> {
        let wanted = |sequence: &Sequence| sequence.id == id && sequence.import.is_some();
        if let Some(waiting) = self.waiting.iter_mut().find(|sequence| wanted(sequence)) {
            waiting.import = None;
            return Ok(());
        }
        let index = self.incoming.iter().position(wanted);
        let index = index.ok_or(EngineError::UnknownImport { id: id.0 })?;
        let mut sequence = self.incoming.remove(index);
        sequence.release();
        sequence.import = None;
        sequence.cached = 0;
        self.enqueue(sequence);
        Ok(())
    }
}

/// Turns an import whose caches of `tokens` tokens have come into a sequence.
fn ready_sequence(
    incoming: Sequence,
    tokens: usize,
    request: Arc<Request>,
    sampler: Sampler,
) -> Sequence {
    let (id, arrival) = (incoming.id, incoming.arrival);
    let mut sequence = Sequence::new(id, request, incoming.tokens, 0, arrival, sampler);
    sequence.position = tokens;
    sequence.cached = tokens;
    sequence.allocation = incoming.allocation;
    if let Some(allocation) = &mut sequence.allocation {
        allocation.state = StateSource::Own;
    }
    sequence
}
