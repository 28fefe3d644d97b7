//! A prefill server's side of a request: the engine exports, and the transfer is offered to the decode server.

use tokio::sync::oneshot;

use super::error::{ApiError, Result};
use super::kv_import::wrong_role;
use super::service::Service;
use crate::engine::{Event, Request, RequestId, Sink};
use crate::error::{EngineError, TransferError};
use crate::transfer::{Offer, Outgoing};

/// The hand-off of a request, or the reason why there is none.
type HandOff = std::result::Result<Vec<u8>, String>;

/// Observes an export's events before its client gets them, and passes the hand-off on.
pub(super) struct HandOffSender(Option<oneshot::Sender<HandOff>>);

impl HandOffSender {
    pub(super) fn see(&mut self, event: &Event) {
        let hand_off = match event {
            Event::HandOff(hand_off) => {
                serde_json::to_vec(hand_off).map_err(|error| error.to_string())
            }
            Event::Failed(error) => Err(error.to_string()),
            _ => return,
        };
        if let Some(sender) = self.0.take() {
            // The transfer may have been cancelled.
            let _ = sender.send(hand_off);
        }
    }
}

/// The observer and the receiver of the hand-off of a request that is still to be submitted.
pub(super) fn hand_off_channel() -> (HandOffSender, oneshot::Receiver<HandOff>) {
    let (sender, receiver) = oneshot::channel();
    (HandOffSender(Some(sender)), receiver)
}

/// Submits a request whose caches are exported under the name `id`.
///
/// # Errors
/// A request that cannot run, or a name that is in use.
pub(super) async fn export(
    service: &Service,
    request: Request,
    sink: Sink,
    handed: oneshot::Receiver<HandOff>,
    id: &str,
) -> Result<(RequestId, Offer)> {
    let producer = service.transfers().and_then(|all| all.producer.as_ref());
    let producer = producer.ok_or_else(|| wrong_role("do_remote_decode", "kv_producer"))?;
    let engine = service.engine().clone();
    let exported = tokio::task::spawn_blocking(move || engine.export(request, sink)).await;
    let stream = exported.unwrap_or(Err(EngineError::Stopped));
    let stream = stream.map_err(|error| super::answers::refusal(service, &error.into()))?;
    let (header, request) = (stream.header().clone(), stream.request());
    let outgoing = Outgoing {
        header,
        records: Box::new(stream),
        hand_off: Box::pin(async {
            let ended = |_| "the request ended before its first token".to_owned();
            handed.await.map_err(ended).flatten()
        }),
    };
    let offer = producer.offer(id.to_owned(), outgoing);
    let offer = offer.map_err(|error| match error {
        TransferError::Duplicate { .. } | TransferError::IdLength { .. } => {
            ApiError::field("kv_transfer_params.transfer_id", error.to_string())
        }
        other => ApiError::unavailable(other.to_string()),
    })?;
    let request = request.ok_or_else(super::answers::stopped)?;
    Ok((request, offer))
}
