//! Requests on their way through the engine: their outputs as they come, and their end when nobody waits for them.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::sync::mpsc::{self, UnboundedReceiver};

use super::error::{ApiError, Result};
use super::gate::Inside;
use super::metrics::Watch;
use super::service::Service;
use crate::engine::{EngineHandle, Event, Output, OutputProcessor, Request, RequestId};
use crate::error::{EngineError, Error};

/// The outputs of the requests that one call makes. Dropping it cancels them: a client that went away frees what it held.
pub(super) struct Answers {
    ids: Vec<RequestId>,
    engine: EngineHandle,
    outputs: UnboundedReceiver<(usize, Output)>,
    /// Outputs that came before all requests had been taken.
    early: VecDeque<(usize, Output)>,
    /// A shutdown waits for it.
    _inside: Arc<Inside>,
}

impl Drop for Answers {
    fn drop(&mut self) {
        self.ids.iter().for_each(|id| self.engine.cancel(*id));
    }
}

impl Answers {
    /// Gives requests to the engine and waits until it has taken them. The channel has no bound: it holds at most their
    /// answers, and the engine must never wait for a client.
    ///
    /// # Errors
    /// A request that cannot run, or one too many: then none of them does.
    pub(super) async fn submit(
        service: &Service,
        requests: Vec<Request>,
        processor: &OutputProcessor,
        inside: Arc<Inside>,
        log: Option<String>,
    ) -> Result<Self> {
        let (sender, outputs) = mpsc::unbounded_channel();
        let engine = service.engine().clone();
        let mut answers = Self {
            ids: Vec::with_capacity(requests.len()),
            engine,
            outputs,
            early: VecDeque::new(),
            _inside: inside,
        };
        let mut untaken = requests.len();
        for (index, request) in requests.into_iter().enumerate() {
            let sender = sender.clone();
            let mut watch = Watch::new(Arc::clone(&service.metrics), &request, log.clone());
            let sink = processor.clone().sink(move |output| {
                watch.see(&output.event);
                // Nobody may be listening any more; the request is cancelled then.
                let _ = sender.send((index, output));
            });
            let id = answers.engine.submit(request, sink);
            answers.ids.push(id);
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

    /// The next output, and whose of the requests it is; `None` after the last.
    pub(super) async fn next(&mut self) -> Option<(usize, Output)> {
        match self.early.pop_front() {
            Some(output) => Some(output),
            None => self.outputs.recv().await,
        }
    }
}

fn refusal(service: &Service, error: &Error) -> ApiError {
    match error {
        Error::Engine(EngineError::QueueFull { .. }) => {
            ApiError::overloaded(error.to_string(), service.metrics.retry_after())
        }
        other => ApiError::from(other),
    }
}

/// The engine went away in the middle.
pub(super) fn stopped() -> ApiError {
    ApiError::internal("the engine has stopped")
}
