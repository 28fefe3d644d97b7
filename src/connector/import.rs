//! A decode instance's side of a request: its caches are fetched once the engine has reserved a slot and blocks; if they do not
//! come, the prompt is prefilled here, or the request fails.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::{mpsc, oneshot};
use tokio::task::spawn_blocking;

use super::{Connector, LoadFailure};
use crate::cache::{CacheHeader, LayerRecord};
use crate::engine::{EngineHandle, Event, HandOff, ImportWriter, Request, RequestId, Sink};
use crate::error::{EngineError, Error, TransferError};
use crate::transfer::Consumer;

/// Records queued for the engine, which takes them all at once between two steps.
const RECORDS: usize = 32;

impl Connector {
    /// Submits a request whose caches come from `address` (`host:port`) under the name `id`, and starts to fetch them when the
    /// slot and blocks are reserved.
    ///
    /// # Errors
    /// An engine that has stopped, or a connector that fetches no caches. A request that cannot run fails by an event.
    pub async fn import(
        &self,
        request: Request,
        sink: Sink,
        address: String,
        id: String,
    ) -> Result<(RequestId, Fetch), Error> {
        let consumer = self.consumer.as_ref();
        let consumer = Arc::clone(consumer.ok_or(TransferError::NoRole("kv_consumer"))?);
        let (sender, reserved) = oneshot::channel();
        let (engine, sink) = (self.engine.clone(), observed(sink, sender));
        let (asking, prompt) = (engine.clone(), request.prompt.clone());
        let header = spawn_blocking(move || asking.cache_header(prompt)).await;
        let header = header.unwrap_or(Err(EngineError::Stopped))?;
        // No await from here on: if the caller were dropped during one, its request would never be cancelled.
        let request = engine.import_to(header.clone(), request, sink);
        let fetching = Fetching {
            consumer,
            engine,
            request,
            header,
            address,
            id,
            load_failure: self.config.load_failure,
            recomputed: Arc::clone(&self.recomputed),
        };
        let (stop, stopped) = oneshot::channel();
        tokio::spawn(fetching.run_or_decline(reserved, stopped));
        Ok((request, Fetch { _stop: stop }))
    }
}

/// The caches of an import, which are fetched in a task. Dropping it stops the task, and the prefill instance drops the caches.
#[derive(Debug)]
pub struct Fetch {
    _stop: oneshot::Sender<Infallible>,
}

/// Passes on when an import's slot and blocks are reserved, before the sink has the event.
fn observed(mut sink: Sink, sender: oneshot::Sender<usize>) -> Sink {
    let mut sender = Some(sender);
    Box::new(move |event| {
        if let Event::Reserved { have } = &event
            && let Some(sender) = sender.take()
        {
            // No task fetches any more if the request was cancelled.
            let _ = sender.send(*have);
        }
        sink(event)
    })
}

/// An import that is being fetched.
struct Fetching {
    consumer: Arc<Consumer>,
    engine: EngineHandle,
    request: RequestId,
    header: CacheHeader,
    address: String,
    id: String,
    load_failure: LoadFailure,
    /// The number of prompts that were prefilled here because their caches did not come.
    recomputed: Arc<AtomicU64>,
}

impl Fetching {
    /// Fetches the caches once slot and blocks are reserved, until `stopped` ends.
    async fn run_or_decline(
        self,
        reserved: oneshot::Receiver<usize>,
        mut stopped: oneshot::Receiver<Infallible>,
    ) {
        let have = tokio::select! {
            biased;
            _ = &mut stopped => None,
            // The request has ended by itself if they never are.
            have = reserved => have.ok(),
        };
        match have {
            Some(have) => tokio::select! {
                _ = stopped => {}
                () = self.run(have) => {}
            },
            None => self.decline().await,
        }
    }

    /// Tells the prefill instance that its caches are not needed; otherwise it would keep them until their time is over.
    async fn decline(&self) {
        let fetching = self
            .consumer
            .fetch(&self.address, &self.id, 0, &self.header);
        // What has begun is cancelled by dropping it; an instance that is gone need not know.
        drop(fetching.await);
    }

    async fn run(self, have: usize) {
        let Err(error) = self.load(have).await else {
            return;
        };
        let (engine, request) = (self.engine.clone(), self.request);
        let recompute = self.load_failure == LoadFailure::Recompute;
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
            self.recomputed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Fetches the caches, has the engine write them, and starts the request.
    async fn load(&self, have: usize) -> Result<(), Error> {
        let fetching = self
            .consumer
            .fetch(&self.address, &self.id, have, &self.header);
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
) -> Result<ImportWriter, Error> {
    let mut batch = Vec::with_capacity(RECORDS);
    while records.blocking_recv_many(&mut batch, RECORDS) > 0 {
        writer.put_all(&batch)?;
        batch.clear();
    }
    Ok(writer)
}
