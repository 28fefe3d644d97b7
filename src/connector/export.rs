//! A prefill instance's side of a request: the engine exports, and the transfer is offered to the decode instance.

use std::ops::ControlFlow;

use tokio::sync::oneshot;
use tokio::task::spawn_blocking;

use super::Connector;
use crate::engine::{Event, Request, RequestId, Sink};
use crate::error::{EngineError, Error, TransferError};
use crate::transfer::{Offer, Outgoing};

/// The hand-off of a request, or the reason why there is none.
type HandOff = Result<Vec<u8>, String>;

impl Connector {
    /// Submits a request whose caches are exported under the name `id`. A decode instance may ask for them before. They are
    /// kept when the request has ended, until they are fetched, the offer is cancelled or its time is over.
    ///
    /// # Errors
    /// A request that cannot run, a name that is in use or too long, or a connector that sends no caches.
    pub async fn export(
        &self,
        request: Request,
        sink: Sink,
        id: &str,
    ) -> Result<(RequestId, Offer), Error> {
        let producer = self.producer.as_ref();
        let producer = producer.ok_or(TransferError::NoRole("kv_producer"))?;
        let (sender, handed) = oneshot::channel();
        let (engine, sink) = (self.engine.clone(), observed(sink, sender));
        let exported = spawn_blocking(move || engine.export(request, sink)).await;
        let stream = exported.unwrap_or(Err(EngineError::Stopped))?;
        let (header, request) = (stream.header().clone(), stream.request());
        let outgoing = Outgoing {
            header,
            records: Box::new(stream),
            hand_off: Box::pin(async {
                let ended = |_| "the request ended before its first token".to_owned();
                handed.await.map_err(ended).flatten()
            }),
        };
        let offer = producer.offer(id.to_owned(), outgoing)?;
        Ok((request.ok_or(EngineError::Stopped)?, offer))
    }
}

/// Passes an export's hand-off to its transfer before the sink has the event.
fn observed(mut sink: Sink, sender: oneshot::Sender<HandOff>) -> Sink {
    let mut sender = Some(sender);
    Box::new(move |event| -> ControlFlow<()> {
        let hand_off = match &event {
            Event::HandOff(hand_off) => {
                Some(serde_json::to_vec(hand_off).map_err(|error| error.to_string()))
            }
            Event::Failed(error) => Some(Err(error.to_string())),
            _ => None,
        };
        if let Some(hand_off) = hand_off
            && let Some(sender) = sender.take()
        {
            // The transfer may have been cancelled.
            let _ = sender.send(hand_off);
        }
        sink(event)
    })
}
