//! An edit of a sequence's slot between two steps: what a token wrote is taken out of the KDA states again.
//!
//! A token changes a head's state to `diag(a) S + b k (v - (diag(a) S)^T k)^T`. The second term, of rank one, is its write;
//! without it the state is `diag(a) S`. The token runs in a step of its own, which reports a. Its output and its latents are
//! those of the token as it ran; the tokens after it run from the edited state.

use super::core::{Engine, pools};
use super::schedule::PlannedSegment;
use crate::backend::{Orientation, StateRecord};
use crate::cache::SavedState;
use crate::error::{EngineError, Error};
use crate::model::{TraceFrame, TraceHead};

/// A write that is taken out of the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UndoWrite {
    /// The position in the prompt of the token that wrote.
    pub token: usize,
    /// The KDA head that wrote; `None` for every head of every KDA layer.
    pub head: Option<TraceHead>,
}

impl UndoWrite {
    fn concerns(&self, head: TraceHead) -> bool {
        self.head.is_none_or(|undone| undone == head)
    }
}

/// A slot before a token whose writes are undone.
pub(super) struct Before {
    /// `None` at the start of a sequence, where the state is zero.
    state: Option<SavedState>,
    undo: Vec<UndoWrite>,
}

impl Engine {
    /// Checks the writes that a request undoes.
    pub(super) fn check_undo(&self, prompt: &[u32], undo: &[UndoWrite]) -> Result<(), EngineError> {
        let refuse = |what, expected, found| {
            Err(EngineError::Undo {
                what,
                expected,
                found,
            })
        };
        let heads = self.model.states().layout.value_heads;
        let layers: Vec<usize> = self.model.config().kda_layers().collect();
        for write in undo {
            if write.token >= prompt.len() {
                let expected = format!("one of the prompt's {}", prompt.len());
                return refuse("token", expected, write.token);
            }
            let Some(TraceHead { layer, head }) = write.head else {
                continue;
            };
            if !layers.contains(&layer) {
                return refuse("KDA layer", format!("one of {layers:?}"), layer);
            }
            if head >= heads {
                return refuse("KDA head", format!("below {heads}"), head);
            }
        }
        Ok(())
    }

    /// Reads the slot before a segment of one token, if that token's writes are undone.
    pub(super) async fn before_undo(
        &mut self,
        segment: &PlannedSegment,
    ) -> Result<Option<Before>, Error> {
        let owner = |id, sample| (id, sample) == (segment.id, segment.sample);
        let mut running = self.running.iter();
        let Some(sequence) = running.find(|sequence| owner(sequence.id, sequence.sample)) else {
            return Ok(None);
        };
        let token = segment.end - 1;
        let undo = sequence.request.undo.iter().copied();
        let undo: Vec<UndoWrite> = undo.filter(|write| write.token == token).collect();
        if undo.is_empty() || sequence.decodes() {
            return Ok(None);
        }
        let allocation = sequence.allocation.as_ref();
        let state = match allocation.and_then(crate::cache::Allocation::slot_in) {
            Some(slot) => Some(pools(&mut self.model).read_slot(slot).await?),
            None => None,
        };
        Ok(Some(Before { state, undo }))
    }

    /// Takes the writes out of the slot after the token; its frame has the log decay of every head.
    pub(super) async fn undo(
        &mut self,
        segment: &PlannedSegment,
        before: &Before,
        frame: &mut TraceFrame,
    ) -> Result<(), Error> {
        let owner = |id, sample| (id, sample) == (segment.id, segment.sample);
        let mut running = self.running.iter();
        let sequence = running.find(|sequence| owner(sequence.id, sequence.sample));
        let Some(allocation) = sequence.and_then(|sequence| sequence.allocation.as_ref()) else {
            return Ok(());
        };
        let slot = allocation.slot.get();
        let mut after = pools(&mut self.model).read_slot(slot).await?;
        for (number, (record, kda)) in after.layers.iter_mut().zip(&frame.kda).enumerate() {
            let old = before.state.as_ref().map(|state| &state.layers[number]);
            for head in 0..record.heads {
                let place = TraceHead {
                    layer: kda.layer,
                    head,
                };
                if before.undo.iter().any(|write| write.concerns(place)) {
                    decay_only(record, old, head, &kda.gates);
                }
            }
        }
        pools(&mut self.model).write_slot(slot, &after)?;
        // The frame shows what the tokens after this one read.
        if let Some(state) = &mut frame.state {
            let place = TraceHead {
                layer: state.layer,
                head: state.head,
            };
            let number = frame.kda.iter().position(|kda| kda.layer == place.layer);
            if let Some(number) = number
                && before.undo.iter().any(|write| write.concerns(place))
            {
                let size = state.state.len();
                let edited = after.layers[number].key_value();
                state.state = edited[place.head * size..(place.head + 1) * size].to_vec();
                state.undone = true;
            }
        }
        Ok(())
    }
}

/// Replaces a head's state by the decayed one before the token: `S <- diag(exp(g)) S'`, with `gates` `[H, K]` the log decay.
fn decay_only(record: &mut StateRecord, before: Option<&StateRecord>, head: usize, gates: &[f32]) {
    let (k, v) = (record.key_width, record.value_width);
    let size = k * v;
    let old = before.map(StateRecord::key_value);
    let (keyed, first) = (record.orientation == Orientation::KeyValue, head * size);
    let state = &mut record.state[first..first + size];
    for (d, gate) in gates[head * k..(head + 1) * k].iter().enumerate() {
        let decay = gate.exp();
        for e in 0..v {
            let kept = old.as_ref().map_or(0.0, |old| old[first + d * v + e]);
            let at = if keyed { d * v + e } else { e * k + d };
            state[at] = decay * kept;
        }
    }
}
