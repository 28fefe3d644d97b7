//! Caches on their way out while a prompt is prefilled: each layer as soon as it is complete, off the engine's thread.
//!
//! The engine asks the device for a copy and hands over the ticket; whoever reads the stream waits for it. The stream has
//! room for so many tickets. What finds no room stays on the device and is held there, or goes to host memory where others
//! need the place: a slow reader costs memory, but no time of anybody's. A stream that is dropped gives all of it back.

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

/// The most blocks of latents in one record.
const RECORD_BLOCKS: usize = 8;

/// A part of the caches that is complete on the device and not read yet.
enum Due {
    State {
        layer: usize,
        slot: SlotRef,
    },
    Latents {
        layer: usize,
        positions: Range<usize>,
        /// From the block that the first position is in.
        blocks: Vec<BlockRef>,
    },
}

/// A part that the device was asked for.
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

/// A request whose caches go out.
pub(super) struct Export {
    id: RequestId,
    /// Tokens of the prompt.
    end: usize,
    /// Tokens whose latents are due, read or gone.
    position: usize,
    /// Its places, while the segment that ends the prompt is computed.
    last: Option<(SlotRef, Vec<BlockRef>)>,
    /// Whether everything is due, read or gone.
    complete: bool,
    /// Tokens from the first on whose latents the receiver has.
    skipped: usize,
    /// The first tokens of the answers, as they are drawn.
    hand_off: HandOff,
    /// Answers whose first token is still to be drawn.
    undrawn: usize,
    due: VecDeque<Due>,
    /// What was read and found no room in the stream.
    read: VecDeque<Read>,
    stream: SyncSender<Read>,
    outcome: Outcome,
}

impl Export {
    /// One of a request's prompt, whose parts go to `stream`.
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

    /// Sends what there is room for. Returns whether it goes on.
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
        // Nobody else sets it: the export is over.
        let _ = self.outcome.set(Ok(self.hand_off.clone()));
        false
    }

    /// Latents of the first `have` tokens are not sent, where they have not been yet.
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

/// All requests whose caches go out.
#[derive(Default)]
pub(super) struct Exports(Vec<Export>);

impl Exports {
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

    /// A sequence has come to `position`.
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

    /// The first token of an answer was drawn; `None` where none is wanted. The hand-off, once it has all of them.
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

    /// Sends what there is room for.
    fn send(&mut self, model: &mut Model) {
        let mut pools = pools(model);
        self.0.retain_mut(|export| export.send(&mut pools));
    }

    /// Takes all that is held on the device to host memory.
    pub(super) fn offload(&mut self, model: &mut Model) {
        let mut pools = pools(model);
        for export in &mut self.0 {
            let read = export.due.drain(..).map(|due| due.read(&mut pools));
            export.read.extend(read);
        }
    }

    /// Whether anything is held on the device for want of room in a stream.
    pub(super) fn is_on_device(&self) -> bool {
        self.0.iter().any(|export| !export.due.is_empty())
    }

    /// The slots and blocks that are held.
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
                // It is unset: an export that has one is in the list no more.
                let _ = export.outcome.set(Err(Arc::clone(error)));
            }
            export.id != id
        });
    }

    /// The requests whose caches are still to be sent.
    pub(super) fn ids(&self) -> impl Iterator<Item = RequestId> + '_ {
        self.0.iter().map(|export| export.id)
    }
}

impl Engine {
    /// Sends what streams have room for, whose readers have taken something.
    pub fn send_exports(&mut self) {
        self.exports.send(&mut self.model);
    }

    /// Leaves out the latents of the first `have` tokens of an export, which its receiver has; what was read of them by now is
    /// left out by the stream ([`ExportStream::skip_latents`](super::ExportStream::skip_latents)).
    pub fn skip_latents(&mut self, id: RequestId, have: usize) {
        let block_tokens = self.model.limits().block_tokens;
        let mut exports = self.exports.0.iter_mut();
        if let Some(export) = exports.find(|export| export.id == id) {
            export.skip_latents(have, block_tokens);
        }
    }

    /// Whether a batch ends the prompt of a request whose caches go out: it is then computed in parts of a layer each.
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
                // What came from the cache.
                export.all_latents(sequence.position, &allocation.blocks, &pools);
                export.last = Some((allocation.slot.clone(), allocation.blocks.clone()));
                ends = true;
            }
        }
        ends
    }
}
