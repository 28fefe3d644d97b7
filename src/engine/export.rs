//! Sends caches while a prompt is prefilled: each layer as soon as it is complete, without blocking the engine's thread.
//!
//! The engine starts a copy on the device and passes the ticket on; the reader of the stream waits for it. The stream has a
//! limited capacity for tickets. Parts beyond it stay on the device, with a reference to their slot and blocks, or are copied
//! to host memory when other sequences need these: a slow reader costs memory, but delays no other request. Dropping a stream
//! frees all of it.

use std::collections::{HashSet, VecDeque};
use std::ops::Range;
use std::sync::mpsc::{SyncSender, TrySendError};
use std::sync::{Arc, OnceLock};

use super::core::{Engine, pools};
use super::hand_off::{DrawnToken, HandOff};
use super::request::{Request, RequestId};
use super::schedule::Planned;
use crate::backend::{Block, LatentRecord, Slot, StateRecord, Ticket};
use crate::cache::{Allocation, BlockRef, Pools, SlotRef};
use crate::error::Error;
use crate::model::{LayerCache, Model};

/// Maximum number of latent blocks in one record.
const RECORD_BLOCKS: usize = 8;

/// A part of the caches that is complete on the device and has not been read yet.
enum Due {
    State {
        layer: usize,
        slot: SlotRef,
    },
    Latents {
        layer: usize,
        positions: Range<usize>,
        /// Blocks from the one with the first position on.
        blocks: Vec<BlockRef>,
    },
}

/// A part whose copy from the device was started.
pub(super) enum Read {
    State {
        layer: usize,
        ticket: Ticket<StateRecord>,
    },
    Latents {
        layer: usize,
        start: usize,
        /// Rows of the first block that are before `start`.
        skip: usize,
        tickets: Vec<Ticket<LatentRecord>>,
    },
}

impl Due {
    fn read(&self, pools: &mut Pools<'_>) -> Read {
        match self {
            Self::State { layer, slot } => Read::State {
                layer: *layer,
                ticket: pools.backend.read_state(&pools.states, *layer, slot.get()),
            },
            Self::Latents {
                layer,
                positions,
                blocks,
            } => {
                let block_tokens = pools.latents.layout.block_tokens;
                let skip = positions.start % block_tokens;
                let mut end = skip + positions.len();
                let tickets = blocks.iter().map(|block| {
                    let tokens = end.min(block_tokens);
                    end -= tokens;
                    let (pool, block) = (&pools.latents, block.get());
                    pools.backend.read_latents(pool, *layer, block, tokens)
                });
                Read::Latents {
                    layer: *layer,
                    start: positions.start,
                    skip,
                    tickets: tickets.collect(),
                }
            }
        }
    }
}

/// How an export ended: with the first tokens of the answers, or an error.
pub(super) type Outcome = Arc<OnceLock<Result<HandOff, Arc<Error>>>>;

/// An exported request.
pub(super) struct Export {
    id: RequestId,
    /// Tokens of the prompt.
    end: usize,
    /// Number of tokens whose latents are complete, whether sent yet or not.
    position: usize,
    /// Its slot and blocks, while the segment that ends the prompt is computed.
    last: Option<(SlotRef, Vec<BlockRef>)>,
    /// Whether all parts are complete, whether sent yet or not.
    complete: bool,
    /// Number of leading tokens whose latents the receiver has.
    skipped: usize,
    /// The first tokens of the answers sampled so far.
    hand_off: HandOff,
    /// Number of answers whose first token is still to be sampled.
    undrawn: usize,
    due: VecDeque<Due>,
    /// Parts that were read but found the stream full.
    read: VecDeque<Read>,
    stream: SyncSender<Read>,
    outcome: Outcome,
}

impl Export {
    /// An export of a request's prompt, whose parts go to `stream`.
    pub(super) fn new(
        id: RequestId,
        request: &Request,
        stream: SyncSender<Read>,
        outcome: Outcome,
    ) -> Self {
        Self {
            id,
            end: request.prompt.len(),
            position: 0,
            last: None,
            complete: false,
            skipped: 0,
            hand_off: HandOff {
                sampling: request.sampling.clone(),
                first: vec![None; request.samples],
            },
            undrawn: request.samples,
            due: VecDeque::new(),
            read: VecDeque::new(),
            stream,
            outcome,
        }
    }

    /// Latents of a layer up to `end` are complete.
    fn latents(&mut self, layer: usize, end: usize, blocks: &[BlockRef], block_tokens: usize) {
        let mut at = self.position.max(self.skipped);
        while at < end {
            let first = at / block_tokens;
            let until = end.min((first + RECORD_BLOCKS) * block_tokens);
            self.due.push_back(Due::Latents {
                layer,
                positions: at..until,
                blocks: blocks[first..until.div_ceil(block_tokens)].to_vec(),
            });
            at = until;
        }
    }

    /// Latents of all layers up to `end` are complete.
    fn all_latents(&mut self, end: usize, blocks: &[BlockRef], pools: &Pools<'_>) {
        let layout = pools.latents.layout;
        for layer in 0..layout.layers {
            self.latents(layer, end, blocks, layout.block_tokens);
        }
        self.position = end;
    }

    /// Sends as much as the stream has capacity for. Returns whether the export continues.
    fn send(&mut self, pools: &mut Pools<'_>) -> bool {
        loop {
            let next = self.read.pop_front();
            let next = next.or_else(|| Some(self.due.pop_front()?.read(pools)));
            let Some(next) = next else { break };
            match self.stream.try_send(next) {
                Ok(()) => {}
                Err(TrySendError::Full(next)) => {
                    self.read.push_front(next);
                    return true;
                }
                Err(TrySendError::Disconnected(_)) => return false,
            }
        }
        if !self.complete || self.undrawn > 0 {
            return true;
        }
        // Nothing else sets the result: the export is over.
        let _ = self.outcome.set(Ok(self.hand_off.clone()));
        false
    }

    /// Leaves out the latents of the first `have` tokens, as far as they have not been sent.
    fn skip_latents(&mut self, have: usize, block_tokens: usize) {
        self.skipped = self.skipped.max(have);
        self.due.retain_mut(|due| {
            let Due::Latents {
                positions, blocks, ..
            } = due
            else {
                return true;
            };
            let start = positions.start.max(have.min(positions.end));
            blocks
                .drain(..(start / block_tokens - positions.start / block_tokens).min(blocks.len()));
            positions.start = start;
            positions.start < positions.end
        });
    }
}

/// All exported requests.
#[derive(Default)]
pub(super) struct Exports(Vec<Export>);

impl Exports {
    /// Whether no request is exported.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn add(&mut self, export: Export) {
        self.0.push(export);
    }

    /// A layer of the segments that end prompts has been submitted.
    pub(super) fn layer_done(&mut self, model: &mut Model, layer: usize) {
        let (cache, last) = (
            model.layer_cache(layer),
            layer + 1 == model.config().layers.len(),
        );
        let block_tokens = model.limits().block_tokens;
        for export in &mut self.0 {
            let Some((slot, blocks)) = export.last.take() else {
                continue;
            };
            match cache {
                LayerCache::State(layer) => {
                    let slot = slot.clone();
                    export.due.push_back(Due::State { layer, slot });
                }
                LayerCache::Latents(layer) => {
                    export.latents(layer, export.end, &blocks, block_tokens);
                }
            }
            if last {
                export.position = export.end;
                export.complete = true;
            } else {
                export.last = Some((slot, blocks));
            }
        }
        self.send(model);
    }

    /// A sequence has reached `position`.
    pub(super) fn moved(
        &mut self,
        model: &mut Model,
        id: RequestId,
        position: usize,
        at: &Allocation,
    ) {
        let Some(export) = self.0.iter_mut().find(|export| export.id == id) else {
            return;
        };
        if !export.complete {
            export.all_latents(position, &at.blocks, &pools(model));
        }
        self.send(model);
    }

    /// The first token of an answer was sampled; `None` if the request wants none. Returns the hand-off once all answers have
    /// theirs.
    pub(super) fn drawn(
        &mut self,
        model: &mut Model,
        id: RequestId,
        sample: usize,
        token: Option<&DrawnToken>,
    ) -> Option<Box<HandOff>> {
        let export = self.0.iter_mut().find(|export| export.id == id)?;
        *export.hand_off.first.get_mut(sample)? = token.cloned();
        export.undrawn = export.undrawn.saturating_sub(1);
        if export.undrawn > 0 {
            return None;
        }
        let hand_off = Box::new(export.hand_off.clone());
        self.send(model);
        Some(hand_off)
    }

    /// Sends as much as the streams have capacity for.
    fn send(&mut self, model: &mut Model) {
        let mut pools = pools(model);
        self.0.retain_mut(|export| export.send(&mut pools));
    }

    /// Copies all that is held on the device to host memory.
    pub(super) fn offload(&mut self, model: &mut Model) {
        let mut pools = pools(model);
        for export in &mut self.0 {
            let read = export.due.drain(..).map(|due| due.read(&mut pools));
            export.read.extend(read);
        }
    }

    /// Whether anything is held on the device because a stream is full.
    pub(super) fn is_on_device(&self) -> bool {
        self.0.iter().any(|export| !export.due.is_empty())
    }

    /// The slots and blocks in use by exports.
    pub(super) fn held(&self, slots: &mut HashSet<Slot>, blocks: &mut HashSet<Block>) {
        for due in self.0.iter().flat_map(|export| &export.due) {
            match due {
                Due::State { slot, .. } => slots.extend([slot.get()]),
                Due::Latents { blocks: held, .. } => blocks.extend(held.iter().map(BlockRef::get)),
            }
        }
    }

    /// Ends an export with an error.
    pub(super) fn fail(&mut self, id: RequestId, error: &Arc<Error>) {
        self.0.retain(|export| {
            if export.id == id {
                // It is not set yet: an export with a result is no longer in the list.
                let _ = export.outcome.set(Err(Arc::clone(error)));
            }
            export.id != id
        });
    }

    /// The requests whose caches are not completely sent.
    pub(super) fn ids(&self) -> impl Iterator<Item = RequestId> + '_ {
        self.0.iter().map(|export| export.id)
    }
}

impl Engine {
    /// Sends to streams whose readers have taken parts.
    pub fn send_exports(&mut self) {
        self.exports.send(&mut self.model);
    }

    /// Leaves out the latents of the first `have` tokens of an export, which its receiver has; the stream leaves out what was
    /// read of them before ([`ExportStream::skip_latents`](super::ExportStream::skip_latents)).
    pub fn skip_latents(&mut self, id: RequestId, have: usize) {
        let block_tokens = self.model.limits().block_tokens;
        let mut exports = self.exports.0.iter_mut();
        if let Some(export) = exports.find(|export| export.id == id) {
            export.skip_latents(have, block_tokens);
        }
    }

    /// Whether a batch ends the prompt of an exported request: it is then computed in parts of one layer each.
    pub(super) fn exports_end(&mut self, planned: &Planned) -> bool {
        let mut ends = false;
        for segment in &planned.segments {
            let Some(export) = self
                .exports
                .0
                .iter_mut()
                .find(|export| export.id == segment.id && export.end == segment.end)
            else {
                continue;
            };
            let sequence = self.running.iter().find(|other| other.id == segment.id);
            if let Some((sequence, allocation)) =
                sequence.and_then(|it| Some((it, it.allocation.as_ref()?)))
            {
                let pools = pools(&mut self.model);
                // The part that came from the prefix cache.
                export.all_latents(sequence.position, &allocation.blocks, &pools);
                export.last = Some((allocation.slot.clone(), allocation.blocks.clone()));
                ends = true;
            }
        }
        ends
    }
}
