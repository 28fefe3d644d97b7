//! Caches on their way in: slot and blocks are reserved first, layers come in any order, and the sequence runs when all are
//! there. Until then nobody waits for it, and where it is given up nothing of it stays.

use std::sync::Arc;

use super::core::{Engine, pools};
use super::request::{Request, RequestId};
use super::sequence::Sequence;
use crate::cache::{Allocation, Assembled, CacheHeader, CacheLayout, StateSource};
use crate::error::{CacheError, EngineError, Error};

/// A request whose caches are still to come.
pub(super) struct Incoming {
    pub(super) id: RequestId,
    request: Arc<Request>,
    /// Tokens that are through when its caches are there.
    position: usize,
    arrival: u64,
    pub(super) allocation: Allocation,
}

impl Incoming {
    /// Answers that are to come of it.
    pub(super) fn answers(&self) -> usize {
        self.request.samples
    }
}

impl Engine {
    /// The pools that caches are loaded into.
    #[must_use]
    pub fn cache_layout(&self) -> CacheLayout {
        CacheLayout {
            states: self.model.states().layout,
            latents: self.model.latents().layout,
            shard: self.model.shard(),
        }
    }

    /// Reserves a slot, and blocks for the whole prompt, for a request that goes on from caches which are still to come. Its
    /// prompt begins with the tokens of `header` and has one more at least.
    ///
    /// # Errors
    /// A request that cannot run, caches of another model or of other tokens, or no room.
    pub async fn import(
        &mut self,
        id: RequestId,
        request: Request,
        header: &CacheHeader,
    ) -> Result<(), Error> {
        self.check(id, &request)?;
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
        if position == 0 || position >= prompt.len() || !prompt.starts_with(&header.tokens) {
            let expected = format!("the first of the prompt's {}, and not all", prompt.len());
            let found = format!("{position} tokens");
            return Err(mismatch("tokens", expected, found).into());
        }
        let blocks = prompt.len().div_ceil(self.model.limits().block_tokens);
        let none = EngineError::NoRoomToImport {
            tokens: prompt.len(),
        };
        let mut pools = pools(&mut self.model);
        let Some(slot) = self.cache.slot(&mut pools).await? else {
            return Err(none.into());
        };
        let Some(blocks) = self.cache.blocks(&mut pools, blocks).await? else {
            return Err(none.into());
        };
        let arrival = self.arrival();
        self.incoming.push(Incoming {
            id,
            request: Arc::new(request),
            position,
            arrival,
            allocation: Allocation {
                slot,
                state: StateSource::Own,
                blocks,
            },
        });
        Ok(())
    }

    /// Writes a layer's part of caches that come in to the places reserved for them.
    ///
    /// # Errors
    /// A request that was given up, or a device that fails.
    pub fn load_layer(&mut self, id: RequestId, part: &Assembled) -> Result<(), Error> {
        let incoming = self.incoming.iter().find(|incoming| incoming.id == id);
        let places = &incoming
            .ok_or(EngineError::UnknownImport { id: id.0 })?
            .allocation;
        let pools = pools(&mut self.model);
        match part {
            Assembled::State { layer, record } => {
                let slot = places.slot.get();
                pools
                    .backend
                    .write_state(&pools.states, *layer, slot, record)?;
            }
            Assembled::Latents {
                layer,
                block,
                record,
            } => {
                let block = places.blocks[*block].get();
                pools
                    .backend
                    .write_latents(&pools.latents, *layer, block, record)?;
            }
        }
        Ok(())
    }

    /// All layers are there: the sequence runs, or waits for its turn.
    ///
    /// # Errors
    /// A request that was given up, or a device that fails.
    pub async fn start_import(&mut self, id: RequestId) -> Result<(), Error> {
        let place = self.incoming.iter().position(|incoming| incoming.id == id);
        let place = place.ok_or(EngineError::UnknownImport { id: id.0 })?;
        let incoming = self.incoming.remove(place);
        let tokens = self.cache.hash(&incoming.request.prompt);
        let (request, arrival) = (incoming.request, incoming.arrival);
        let mut sequence = Sequence::new(id, request, tokens, 0, arrival, &self.suppressed);
        sequence.position = incoming.position;
        sequence.cached = incoming.position;
        sequence.allocation = Some(incoming.allocation);
        if self.running.len() < self.model.limits().step.segments {
            self.running.push(sequence);
        } else {
            self.suspend(&mut sequence).await?;
            self.enqueue(sequence);
        }
        Ok(())
    }
}
