//! A request in the engine, as Dynamo's response stream.

use std::ops::ControlFlow;
use std::sync::Arc;

use dynamo_backend_common::{AsyncEngineContext, DynamoError, ErrorType, LLMEngineOutput};
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use kimi_linear::connector::Fetch;
use kimi_linear::engine::{EngineHandle, Event, FinishReason, RequestId, Sink};
use kimi_linear::error::EngineError;
use kimi_linear::transfer::Offer;
use serde_json::Value;
use tokio::sync::mpsc::{self, UnboundedReceiver};

use super::counts::Counted;
use crate::wire::{ChunkWriter, dynamo_error};

/// An item of a response stream.
pub(super) type Item = Result<LLMEngineOutput, DynamoError>;

/// A response stream.
pub(super) type ItemStream = BoxStream<'static, Item>;

/// Frees what a request holds when its stream is dropped, however that happens.
pub(super) struct Guard {
    pub(super) engine: EngineHandle,
    pub(super) id: RequestId,
    /// The prompt's caches, while they are fetched.
    pub(super) fetching: Option<Fetch>,
    /// The prompt's caches, for a decode worker. They outlive the answer here.
    pub(super) offer: Option<Offer>,
    /// Whether the request has come to its end.
    pub(super) finished: bool,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        self.fetching = None;
        if let Some(offer) = &self.offer {
            offer.cancel("the request was cancelled at the prefill worker");
        }
        self.engine.cancel(self.id);
    }
}

/// A sink, and the receiver of its events. With `stops` an answer ends when the receiver is dropped; an export goes on.
pub(super) fn channel(stops: bool) -> (Sink, UnboundedReceiver<Event>) {
    let (sender, events) = mpsc::unbounded_channel();
    let sink = move |event| match sender.send(event) {
        Err(_) if stops => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    };
    (Box::new(sink), events)
}

/// A request in the engine.
pub(super) struct Answer {
    pub(super) events: UnboundedReceiver<Event>,
    pub(super) context: Arc<dyn AsyncEngineContext>,
    pub(super) writer: ChunkWriter,
    pub(super) counted: Counted,
    pub(super) guard: Guard,
    /// For a prefill: what its end tells the decode worker.
    pub(super) hand_off: Option<Value>,
}

impl Answer {
    /// Waits until the request is queued.
    ///
    /// # Errors
    /// An invalid request. All other errors come by the stream, for which the router blames no healthy worker.
    pub(super) async fn accepted(mut self) -> Result<ItemStream, DynamoError> {
        let first = tokio::select! {
            event = self.events.recv() => event,
            // The stream tells that.
            () = self.context.stopped() => return Ok(self.into_stream()),
        };
        match first {
            Some(Event::Failed(error)) => {
                self.guard.finished = true;
                failed(dynamo_error(&error))
            }
            // The first event is `Queued`, which the frontend takes for granted.
            Some(_) => Ok(self.into_stream()),
            None => failed(dynamo_error(&EngineError::Stopped.into())),
        }
    }

    fn into_stream(self) -> ItemStream {
        let items = stream::unfold(Some(self), |answer| async {
            let mut answer = answer?;
            let (item, is_last) = answer.next().await;
            Some((item, (!is_last).then_some(answer)))
        });
        items.boxed()
    }

    /// The next item, and whether it is the last.
    async fn next(&mut self) -> (Item, bool) {
        loop {
            let event = tokio::select! {
                biased;
                () = self.context.stopped() => None,
                () = self.context.killed() => None,
                event = self.events.recv() => Some(event),
            };
            let Some(event) = event else {
                return (Ok(self.writer.cancelled()), true);
            };
            let Some(event) = event else {
                self.guard.finished = true;
                return (Err(dynamo_error(&EngineError::Stopped.into())), true);
            };
            if let Some(item) = self.item(event) {
                return item;
            }
        }
    }

    fn item(&mut self, event: Event) -> Option<(Item, bool)> {
        self.counted.see(&event);
        if let Some(params) = self.hand_off.clone() {
            let chunk = self.prefill_item(event, params)?;
            self.guard.finished = true;
            return Some((chunk, true));
        }
        let item = self.writer.write(event)?;
        let is_last = item
            .as_ref()
            .map_or(true, |chunk| chunk.finish_reason.is_some());
        self.guard.finished |= is_last;
        Some((item, is_last))
    }

    /// The only item of a prefill, once it is there: Dynamo takes the first one for the end.
    fn prefill_item(&mut self, event: Event, params: Value) -> Option<Item> {
        match event {
            Event::HandOff(hand_off) => Some(Ok(self.writer.handed_off(&hand_off, params))),
            Event::Failed(error) => Some(Err(dynamo_error(&error))),
            // The decode worker wants the caches no more. If it prefills the prompt itself, this must not end its answer.
            Event::Finished {
                reason: FinishReason::Cancelled,
                ..
            } => Some(Ok(self
                .writer
                .prefilled(None, Value::Object(Default::default())))),
            _ => None,
        }
    }
}

/// The error of a request that has not begun: at once if no worker can answer it, otherwise by the stream.
pub(super) fn failed(error: DynamoError) -> Result<ItemStream, DynamoError> {
    match error.class() {
        ErrorType::InvalidRequest => Err(error),
        _ => Ok(once(Err(error))),
    }
}

/// A stream of one item.
pub(super) fn once(item: Item) -> ItemStream {
    stream::once(async { item }).boxed()
}
