//! The reading side of an export: a stream of records, which waits for the device in the reader's thread.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};

use super::core::Engine;
use super::event::Sink;
use super::export::{Export, Outcome, Read};
use super::hand_off::HandOff;
use super::handle::EngineHandle;
use super::request::{PromptScores, Request, RequestId};
use crate::backend::{LatentRecord, Shard, StateLayout};
use crate::cache::{CacheHeader, LayerRecord};
use crate::error::{EngineError, Error};
#[cfg(feature = "transfer")]
use crate::transfer::RecordSource;

/// Capacity of a stream of an engine in a thread, in reads of the device.
const CAPACITY: usize = 64;

impl Engine {
    /// Submits a request whose caches, of all tokens of its prompt, are sent as they are computed. The stream has capacity
    /// for `capacity` reads of the device; after some were taken, [`Engine::send_exports`] sends more.
    ///
    /// Only the first token of each answer is sampled here, whatever [`Request::max_tokens`] says: the caches are those of
    /// the prompt's end, which hold no logits. The tokens are events, and [`ExportStream::hand_off`] passes them to the
    /// engine that continues; with `max_tokens` 0 none are sampled. To answer here as well, submit the prompt again: it
    /// continues from the cached prefix.
    ///
    /// # Errors
    /// Those of [`Engine::submit`], and a request with writes to undo.
    pub fn export(
        &mut self,
        id: RequestId,
        request: Request,
        capacity: usize,
    ) -> Result<ExportStream, EngineError> {
        if !request.undo.is_empty() {
            return Err(EngineError::UndoTransfer);
        }
        let header = CacheHeader {
            model: self.fingerprint,
            tokens: request.prompt.clone(),
        };
        let request = Request {
            max_tokens: request.max_tokens.min(1),
            trace: None,
            scores: PromptScores::None,
            ..request
        };
        let (stream, reads) = mpsc::sync_channel(capacity);
        let outcome = Outcome::default();
        let export = Export::new(id, &request, stream, Arc::clone(&outcome));
        self.submit(id, request)?;
        self.exports.add(export);
        Ok(ExportStream {
            id: header.id(),
            header,
            states: self.model.states().layout,
            shard: Shard::WHOLE,
            reads,
            ready: VecDeque::new(),
            skipped: 0,
            outcome,
            failed: false,
            engine: None,
        })
    }
}

/// The caches of a request, one tensor of one layer at a time, as they are computed. Dropping it ends the request.
///
/// An item is an error if the request or the device failed; no item follows, and the items before are of no use.
pub struct ExportStream {
    header: CacheHeader,
    id: u128,
    states: StateLayout,
    shard: Shard,
    reads: Receiver<Read>,
    ready: VecDeque<LayerRecord>,
    /// Number of leading tokens whose latents the receiver has.
    skipped: usize,
    outcome: Outcome,
    /// Whether an error was returned, which ends the stream.
    failed: bool,
    /// The engine in a thread of its own, which is notified of every record that was taken.
    engine: Option<(EngineHandle, RequestId)>,
}

impl ExportStream {
    /// The request's id; `None` without an [`EngineHandle`].
    #[must_use]
    pub fn request(&self) -> Option<RequestId> {
        self.engine.as_ref().map(|(_, id)| *id)
    }

    /// The model and tokens that the records belong to.
    #[must_use]
    pub fn header(&self) -> &CacheHeader {
        &self.header
    }

    /// The next record, if one is ready.
    pub fn try_next(&mut self) -> Option<Result<LayerRecord, Arc<Error>>> {
        while self.ready.is_empty() && !self.failed {
            let read = self.reads.try_recv().ok()?;
            if let Err(error) = self.take(read) {
                return self.fail(Arc::new(error));
            }
        }
        self.ready.pop_front().map(Ok)
    }

    /// The first tokens of the answers, once all records have come.
    #[must_use]
    pub fn hand_off(&self) -> Option<&HandOff> {
        self.outcome.get()?.as_ref().ok()
    }

    /// Leaves out the latents of the first `have` tokens, which the receiver has, from all further records. Without an
    /// [`EngineHandle`] the engine itself is told by [`Engine::skip_latents`].
    pub fn skip_latents(&mut self, have: usize) {
        self.skipped = self.skipped.max(have);
        if let Some((engine, id)) = &self.engine {
            engine.skip_latents(*id, have);
        }
    }

    fn fail<T>(&mut self, error: Arc<Error>) -> Option<Result<T, Arc<Error>>> {
        self.failed = true;
        Some(Err(error))
    }

    /// Waits for a part and splits it into records.
    fn take(&mut self, read: Read) -> Result<(), Error> {
        if let Some((engine, _)) = &self.engine {
            engine.room_in_stream();
        }
        match read {
            Read::State { layer, ticket } => {
                let (end, record) = (self.header.tokens.len(), ticket.wait()?);
                let (states, shard) = (&self.states, self.shard);
                self.ready.extend(LayerRecord::of_state(
                    self.id, layer, end, states, shard, &record,
                ));
            }
            Read::Latents {
                layer,
                start,
                skip,
                tickets,
            } => {
                let mut joined: Option<LatentRecord> = None;
                for ticket in tickets {
                    let record = ticket.wait()?;
                    match &mut joined {
                        Some(joined) => joined.rows.extend(record.rows),
                        None => {
                            let before = skip * record.row_bytes();
                            let rows = record.rows[before..].to_vec();
                            joined = Some(LatentRecord { rows, ..record });
                        }
                    }
                }
                // Cuts what was read before the receiver sent its `have`.
                let record = joined.and_then(|mut rows| {
                    let first = start.max(self.skipped);
                    let before = (first - start) * rows.row_bytes();
                    if before >= rows.rows.len() {
                        return None;
                    }
                    rows.rows.drain(..before);
                    Some(LayerRecord::of_latents(self.id, layer, first, rows))
                });
                self.ready.extend(record);
            }
        }
        Ok(())
    }
}

impl Iterator for ExportStream {
    type Item = Result<LayerRecord, Arc<Error>>;

    /// Waits for the next record; `None` after the last.
    fn next(&mut self) -> Option<Self::Item> {
        while self.ready.is_empty() && !self.failed {
            let Ok(read) = self.reads.recv() else {
                return match self.outcome.get().cloned() {
                    Some(Ok(_)) => None,
                    Some(Err(error)) => self.fail(error),
                    None => self.fail(Arc::new(Error::from(EngineError::Stopped))),
                };
            };
            if let Err(error) = self.take(read) {
                return self.fail(Arc::new(error));
            }
        }
        self.ready.pop_front().map(Ok)
    }
}

#[cfg(feature = "transfer")]
impl RecordSource for ExportStream {
    fn skip_latents(&mut self, tokens: usize) {
        Self::skip_latents(self, tokens);
    }

    fn next_record(&mut self) -> Option<Result<LayerRecord, Arc<Error>>> {
        self.next()
    }

    fn stopper(&self) -> Option<Box<dyn FnOnce() + Send>> {
        let (engine, id) = self.engine.clone()?;
        Some(Box::new(move || engine.cancel(id)))
    }
}

impl Drop for ExportStream {
    fn drop(&mut self) {
        if let Some((engine, id)) = &self.engine {
            engine.cancel(*id);
        }
    }
}

impl EngineHandle {
    /// Submits a request whose caches, of all tokens of its prompt, are sent as they are computed. `sink` receives its
    /// events, among them the first token of each answer; no more tokens are generated, as [`Engine::export`] says.
    ///
    /// # Errors
    /// A request that cannot run, or an engine that has stopped.
    pub fn export(&self, request: Request, sink: Sink) -> Result<ExportStream, EngineError> {
        let id = self.next_id();
        let mut stream = self.submit_export(id, request, sink, CAPACITY)?;
        stream.engine = Some((self.clone(), id));
        Ok(stream)
    }
}
