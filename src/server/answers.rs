//! Requests on their way through the engine: their events as they come, and their end when nobody waits for them.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::sync::mpsc::{self, UnboundedReceiver};

use super::error::{ApiError, Result};
use super::gate::Inside;
use super::metrics::Watch;
use super::service::Service;
use crate::engine::{EngineHandle, Event, Request, RequestId};
use crate::error::{EngineError, Error};

/// The events of the requests that one call makes. Dropping it cancels them: a client that went away frees what it held.
pub(super) struct Answers {
    ids: Vec<RequestId>,
    engine: EngineHandle,
    events: UnboundedReceiver<(usize, Event)>,
    /// Events that came before all requests had been taken.
    early: VecDeque<(usize, Event)>,
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
        inside: Arc<Inside>,
        log: Option<String>,
    ) -> Result<Self> {
        let (sender, events) = mpsc::unbounded_channel();
        let engine = service.engine().clone();
        let mut answers = Self {
            ids: Vec::with_capacity(requests.len()),
            engine,
            events,
            early: VecDeque::new(),
            _inside: inside,
        };
        let mut untaken = requests.len();
        for (index, request) in requests.into_iter().enumerate() {
            let sender = sender.clone();
            let mut watch = Watch::new(Arc::clone(&service.metrics), &request, log.clone());
            let sink = move |event: Event| {
                watch.see(&event);
                // Nobody may be listening any more; the request is cancelled then.
                let _ = sender.send((index, event));
            };
            let id = answers.engine.submit(request, Box::new(sink));
            answers.ids.push(id);
        }
        drop(sender);
        while untaken > 0 {
            match answers.events.recv().await {
                Some((_, Event::Failed(error))) => return Err(refusal(service, &error)),
                Some((_, Event::Queued { .. })) => untaken -= 1,
                Some(event) => answers.early.push_back(event),
                None => return Err(stopped()),
            }
        }
        Ok(answers)
    }

    /// The next event, and whose of the requests it is; nothing after the last.
    pub(super) async fn next(&mut self) -> Option<(usize, Event)> {
        match self.early.pop_front() {
            Some(event) => Some(event),
            None => self.events.recv().await,
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
