//! Requests of one call in the engine: their outputs as they come, and their cancellation when the client has disconnected.

use std::collections::VecDeque;
use std::sync::Arc;

use serde_json::Value;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};

use super::error::{ApiError, Result};
use super::gate::Inside;
use super::kv_params::{self, Remote};
use super::metrics::Watch;
use super::service::Service;
use crate::connector::Fetch;
use crate::engine::{EngineClient, Event, Output, OutputProcessor, Request, RequestId, Sink};
use crate::error::{EngineError, Error, TransferError};
use crate::transfer::Offer;

/// The outputs of the requests of one call. Dropping it cancels them: a client that disconnects frees what it held.
pub(super) struct Answers {
    ids: Vec<RequestId>,
    engine: Arc<dyn EngineClient>,
    outputs: UnboundedReceiver<(usize, Output)>,
    /// Outputs that came before all requests had been accepted.
    early: VecDeque<(usize, Output)>,
    /// Number of unfinished answers.
    left: usize,
    /// Exported caches: they are kept after all answers are complete.
    offer: Option<Offer>,
    /// The location of the caches, for the client to pass on.
    kv_transfer_params: Option<Value>,
    /// The task that fetches caches.
    _fetching: Option<Fetch>,
    /// Keeps a shutdown waiting.
    _inside: Arc<Inside>,
}

impl Drop for Answers {
    fn drop(&mut self) {
        match &self.offer {
            // The other server fetches them now or later.
            Some(_) if self.left == 0 => return,
            Some(offer) => offer.cancel("the prefill server's client went away"),
            None => {}
        }
        self.ids.iter().for_each(|id| self.engine.cancel(*id));
    }
}

/// Observes a request's events before its client gets them.
struct RequestSink {
    index: usize,
    watch: Watch,
    sender: UnboundedSender<(usize, Output)>,
}

impl RequestSink {
    fn sink(mut self, processor: &OutputProcessor) -> Sink {
        processor.clone().sink(move |output| {
            self.watch.see(&output.event);
            // The client may have disconnected; the request is cancelled then.
            let _ = self.sender.send((self.index, output));
        })
    }
}

impl Answers {
    /// Submits requests to the engine and waits until it has accepted them. `remote` is set if the caches are exported or
    /// imported; there is one request then. The channel is unbounded: it holds at most the answers of these requests, and the
    /// engine must never wait for a client.
    ///
    /// # Errors
    /// A request that cannot run, or one too many: then none of them runs.
    pub(super) async fn submit(
        service: &Service,
        requests: Vec<Request>,
        processor: &OutputProcessor,
        inside: Arc<Inside>,
        log: Option<String>,
        remote: Option<&Remote>,
    ) -> Result<Self> {
        let (sender, outputs) = mpsc::unbounded_channel();
        let engine = Arc::clone(service.engine());
        let mut answers = Self {
            ids: Vec::with_capacity(requests.len()),
            engine,
            outputs,
            early: VecDeque::new(),
            left: requests.iter().map(|request| request.samples).sum(),
            offer: None,
            kv_transfer_params: None,
            _fetching: None,
            _inside: inside,
        };
        let mut untaken = requests.len();
        let see = |(index, request): (usize, Request)| {
            let seen = RequestSink {
                index,
                watch: Watch::new(Arc::clone(&service.metrics), &request, log.clone()),
                sender: sender.clone(),
            };
            (request, seen)
        };
        let seen = requests.into_iter().enumerate().map(see);
        match remote {
            None => {
                let requests = seen.map(|(request, seen)| (request, seen.sink(processor)));
                answers.ids = answers.engine.submit_all(requests.collect());
            }
            Some(remote) => {
                for (request, seen) in seen {
                    answers
                        .begin(service, request, seen, processor, remote)
                        .await?;
                }
            }
        }
        drop(sender);
        while untaken > 0 {
            let (index, output) = answers.outputs.recv().await.ok_or_else(stopped)?;
            match output.event {
                Event::Failed(error) => return Err(refusal(service, &error)),
                Event::Queued { .. } => untaken -= 1,
                _ => answers.early.push_back((index, output)),
            }
        }
        Ok(answers)
    }

    /// Submits a request whose caches are exported or imported.
    async fn begin(
        &mut self,
        service: &Service,
        request: Request,
        seen: RequestSink,
        processor: &OutputProcessor,
        remote: &Remote,
    ) -> Result<()> {
        let connector = service.connector().ok_or_else(kv_params::no_transfers)?;
        let sink = seen.sink(processor);
        match remote {
            Remote::Decode { id } => {
                if !connector.sends() {
                    return Err(kv_params::wrong_role("do_remote_decode", "kv_producer"));
                }
                let id = id.clone().unwrap_or_else(|| connector.next_id());
                let exported = connector.export(request, sink, &id).await;
                let (request, offer) = exported.map_err(|error| refusal(service, &error))?;
                self.ids.push(request);
                self.offer = Some(offer);
                self.kv_transfer_params = Some(kv_params::answer(connector, &id));
            }
            Remote::Prefill { id, address } => {
                if !connector.fetches() {
                    return Err(kv_params::wrong_role("do_remote_prefill", "kv_consumer"));
                }
                let address = connector.address(address.as_ref());
                let address = address.ok_or_else(kv_params::no_address)?;
                let imported = connector.import(request, sink, address, id.clone()).await;
                let (request, fetching) = imported.map_err(|error| refusal(service, &error))?;
                self.ids.push(request);
                self._fetching = Some(fetching);
            }
        }
        Ok(())
    }

    /// The next output, with the index of its request; `None` after the last.
    pub(super) async fn next(&mut self) -> Option<(usize, Output)> {
        let next = match self.early.pop_front() {
            Some(output) => output,
            None => self.outputs.recv().await?,
        };
        if matches!(next.1.event, Event::Finished { .. }) {
            self.left = self.left.saturating_sub(1);
        }
        Some(next)
    }

    /// The location of the prompt's caches, if they are exported (`kv_transfer_params`).
    pub(super) fn kv_transfer_params(&self) -> Option<&Value> {
        self.kv_transfer_params.as_ref()
    }
}

/// The error for a client whose request the engine refused.
pub(super) fn refusal(service: &Service, error: &Error) -> ApiError {
    match error {
        Error::Engine(EngineError::QueueFull { .. }) => {
            ApiError::overloaded(error.to_string(), service.metrics.retry_after())
        }
        Error::Transfer(TransferError::Duplicate { .. } | TransferError::IdLength { .. }) => {
            ApiError::field("kv_transfer_params.transfer_id", error.to_string())
        }
        Error::Transfer(TransferError::Closed) => ApiError::unavailable(error.to_string()),
        other => ApiError::from(other),
    }
}

/// The error for an engine that has stopped during an answer.
pub(super) fn stopped() -> ApiError {
    ApiError::internal("the engine has stopped")
}
