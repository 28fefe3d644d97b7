//! What a server needs of an engine, whether it runs in this process or in others.

use super::event::Sink;
use super::handle::EngineHandle;
use super::request::{Request, RequestId};
use super::status::Status;
#[cfg(feature = "data-parallel")]
use crate::data_parallel::Parameters;
use crate::error::EngineError;

/// An engine, or a router to engines in other processes.
///
/// The events of a request come in order, from [`Event::Queued`](super::Event::Queued) to
/// [`Event::Finished`](super::Event::Finished) of its last answer or [`Event::Failed`](super::Event::Failed).
pub trait EngineClient: Send + Sync + 'static {
    /// Submits requests that are taken together or not at all; each sink receives the events of its request. Where there is no
    /// room for all of them, each fails by an event.
    fn submit_all(&self, requests: Vec<(Request, Sink)>) -> Vec<RequestId>;

    /// Cancels a request; its last events still come.
    fn cancel(&self, id: RequestId);

    /// Whether requests can be answered.
    fn is_running(&self) -> bool;

    /// Running and waiting sequences, and usage of the pools. It may block until a step has ended.
    ///
    /// # Errors
    /// An engine that has stopped.
    fn status(&self) -> Result<Status, EngineError>;

    /// Removes every cached prefix. It may block until a step has ended.
    ///
    /// # Errors
    /// An engine that has stopped.
    fn clear_cache(&self) -> Result<(), EngineError>;

    /// What the parameters of replicas do, where they drop duplicates under a burst.
    #[cfg(feature = "data-parallel")]
    fn parameters(&self) -> Option<Parameters> {
        None
    }
}

impl EngineClient for EngineHandle {
    fn submit_all(&self, requests: Vec<(Request, Sink)>) -> Vec<RequestId> {
        Self::submit_all(self, requests)
    }

    fn cancel(&self, id: RequestId) {
        Self::cancel(self, id);
    }

    fn is_running(&self) -> bool {
        Self::is_running(self)
    }

    fn status(&self) -> Result<Status, EngineError> {
        Self::status(self)
    }

    fn clear_cache(&self) -> Result<(), EngineError> {
        Self::clear_cache(self)
    }
}
