//! A decode server's side of a request: its caches are fetched once the engine has reserved a slot and blocks; if they do not
//! come, the prompt is prefilled here, or the request fails.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};
use tokio::task::{AbortHandle, spawn_blocking};

use super::error::{ApiError, Result};
use super::kv_transfer::{KvTransfers, LoadFailure};
use super::service::Service;
use crate::cache::{CacheHeader, LayerRecord};
use crate::engine::{EngineHandle, Event, HandOff, ImportWriter, Request, RequestId, Sink};
use crate::error::{EngineError, Error, TransferError};

/// Records queued for the engine, which takes them all at once between two steps.
const RECORDS: usize = 32;

/// Observes an import's events before its client gets them: when the slot and blocks are reserved.
pub(super) struct ReservedSender(Option<oneshot::Sender<usize>>);

impl ReservedSender {
    pub(super) fn see(&mut self, event: &Event) {
        if let Event::Reserved { have } = event
            && let Some(sender) = self.0.take()
        {
            // No task fetches any more if the request was cancelled.
            let _ = sender.send(*have);
        }
    }
}

/// The sender and the receiver of that notice, for a request that is still to be submitted.
pub(super) fn reserved_channel() -> (ReservedSender, oneshot::Receiver<usize>) {
    let (sender, receiver) = oneshot::channel();
    (ReservedSender(Some(sender)), receiver)
}

/// Submits a request whose caches come from `address` under the name `id`, and starts to fetch them when the slot and blocks
/// are reserved. Dropping the handle stops fetching.
pub(super) async fn import(
    service: &Service,
    request: Request,
    sink: Sink,
    reserved: oneshot::Receiver<usize>,
    (address, id): (String, String),
) -> Result<(RequestId, AbortHandle)> {
    let transfers = service.transfers().filter(|all| all.consumer.is_some());
    let transfers = transfers.ok_or_else(|| wrong_role("do_remote_prefill", "kv_consumer"))?;
    let transfers = Arc::clone(transfers);
    let engine = service.engine().clone();
    let (asking, prompt) = (engine.clone(), request.prompt.clone());
    let header = spawn_blocking(move || asking.cache_header(prompt)).await;
    let header = header.unwrap_or(Err(EngineError::Stopped));
    let header = header.map_err(|error| ApiError::from(&error))?;
    // No await from here on: if a client disconnected during one, its request would never be cancelled.
    let request = engine.import_to(header.clone(), request, sink);
    let fetching = Fetching {
        transfers,
        engine,
        request,
        header,
        address,
        id,
    };
    let task = tokio::spawn(async move {
        // If the slot and blocks are never reserved, the request has ended by itself.
        if let Ok(have) = reserved.await {
            fetching.run(have).await;
        }
    });
    Ok((request, task.abort_handle()))
}

/// The error for a transfer on a server without transfers.
pub(super) fn no_transfers() -> ApiError {
    let message = "`kv_transfer_params`: this server takes no part in transfers of caches; it is started with --kv-transfer for that";
    ApiError::field("kv_transfer_params", message).code("unsupported_value")
}

/// The error for an import without an address.
pub(super) fn no_address() -> ApiError {
    let message = "`remote_host` and `remote_port` are missing, and this server was given no producer (--kv-transfer connect:HOST:PORT)";
    ApiError::field("kv_transfer_params.remote_host", message).code("missing_required_parameter")
}

/// The error for a request for the other role.
pub(super) fn wrong_role(field: &str, role: &str) -> ApiError {
    let field = format!("kv_transfer_params.{field}");
    let message = format!("`{field}`: this server is no {role}");
    ApiError::field(&field, message).code("unsupported_value")
}

/// An import that is being fetched.
struct Fetching {
    transfers: Arc<KvTransfers>,
    engine: EngineHandle,
    request: RequestId,
    header: CacheHeader,
    address: String,
    id: String,
}

impl Fetching {
    async fn run(self, have: usize) {
        let Err(error) = self.load(have).await else {
            return;
        };
        let (engine, request) = (self.engine.clone(), self.request);
        let recompute = self.transfers.load_failure() == LoadFailure::Recompute;
        tracing::warn!(
            transfer = self.id,
            producer = self.address,
            recompute,
            "caches did not come: {error}"
        );
        let given_up = spawn_blocking(move || match recompute {
            true => engine.recompute_import(request),
            false => engine.fail_import(request, error),
        });
        // A request that has ended waits for nothing, and a stopped engine reports that itself.
        if recompute && matches!(given_up.await, Ok(Ok(()))) {
            self.transfers.recomputed();
        }
    }

    /// Fetches the caches, has the engine write them, and starts the request.
    async fn load(&self, have: usize) -> std::result::Result<(), Error> {
        let consumer = self.transfers.consumer.as_ref();
        let consumer = consumer.ok_or(TransferError::Closed)?;
        let fetching = consumer.fetch(&self.address, &self.id, have, &self.header);
        let mut incoming = fetching.await?;
        let (sender, receiver) = mpsc::channel(RECORDS);
        let (engine, request, header) = (self.engine.clone(), self.request, self.header.clone());
        let writing =
            spawn_blocking(move || write(engine.import_writer(request, header, have)?, receiver));
        while let Some(record) = incoming.next().await? {
            // The writer has given up; its error is returned below.
            if sender.send(record).await.is_err() {
                break;
            }
        }
        drop(sender);
        let stopped = |_| Error::from(EngineError::Stopped);
        let writer = writing.await.map_err(stopped)??;
        let bytes = incoming.hand_off().await?;
        let hand_off: HandOff = serde_json::from_slice(&bytes).map_err(|error| {
            TransferError::frame("hand-off", "the first token of each answer", error)
        })?;
        let started = spawn_blocking(move || writer.start(Some(hand_off)));
        started.await.map_err(stopped)?
    }
}

/// Writes records as they come, all that are queued at a time, until the last.
fn write(
    mut writer: ImportWriter,
    mut records: mpsc::Receiver<LayerRecord>,
) -> std::result::Result<ImportWriter, Error> {
    let mut batch = Vec::with_capacity(RECORDS);
    while records.blocking_recv_many(&mut batch, RECORDS) > 0 {
        writer.put_all(&batch)?;
        batch.clear();
    }
    Ok(writer)
}
