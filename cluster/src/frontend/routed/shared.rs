//! What the answers of one request share: its client.

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};

use kimi_linear::engine::{Event, FinishReason, RequestId, Sink, Usage};
use kimi_linear::error::{EngineError, Error};
use tokio_util::sync::CancellationToken;

use super::super::totals::End;
use super::Client;

/// The client of a request with one answer or several.
pub(super) struct Shared {
    id: RequestId,
    samples: usize,
    /// The client has cancelled the request.
    cancel: CancellationToken,
    /// The request has failed, or all of it has ended: no event follows.
    over: CancellationToken,
    state: Mutex<State>,
    client: Arc<Client>,
}

struct State {
    sink: Sink,
    /// Answers that have not ended.
    left: usize,
    /// Whether an answer was cancelled.
    cancelled: bool,
    over: bool,
}

impl Shared {
    pub(super) fn new(
        id: RequestId,
        samples: usize,
        sink: Sink,
        cancel: CancellationToken,
        client: Arc<Client>,
    ) -> Arc<Self> {
        Arc::new(Self {
            id,
            samples,
            cancel,
            over: CancellationToken::new(),
            state: Mutex::new(State {
                sink,
                left: samples,
                cancelled: false,
                over: false,
            }),
            client,
        })
    }

    pub(super) fn id(&self) -> RequestId {
        self.id
    }

    /// Number of answers.
    pub(super) fn samples(&self) -> usize {
        self.samples
    }

    /// Number of requests that are under way.
    pub(super) fn running(&self) -> usize {
        self.client.active().len()
    }

    /// What all requests share.
    pub(super) fn client(&self) -> &Arc<Client> {
        &self.client
    }

    /// Waits until the client has cancelled the request, or it has ended.
    pub(super) async fn given_up(&self) {
        tokio::select! {
            () = self.cancel.cancelled() => {}
            () = self.over.cancelled() => {}
        }
    }

    /// Passes an event to the client. It breaks where the client wants no more of this answer.
    pub(super) fn send(&self, event: Event) -> ControlFlow<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.over {
            return ControlFlow::Break(());
        }
        let mut end = None;
        match &event {
            Event::Finished { reason, usage, .. } => {
                self.client.totals.answered(usage);
                state.left = state.left.saturating_sub(1);
                state.cancelled |= *reason == FinishReason::Cancelled;
                end = (state.left == 0).then_some(match state.cancelled {
                    true => End::Cancelled,
                    false => End::Finished,
                });
            }
            Event::Failed(_) => end = Some(End::Failed),
            _ => {}
        }
        state.over = end.is_some();
        if let Some(end) = end {
            self.client.active().remove(&self.id);
            self.client.totals.ended(end);
        }
        let flow = (state.sink)(event);
        if end.is_some() {
            self.over.cancel();
        }
        flow
    }

    /// The request has failed, all of its answers.
    pub(super) fn fail(&self, error: EngineError) {
        let _ = self.send(Event::Failed(Arc::new(Error::from(error))));
    }

    /// An answer has ended before its worker said so.
    pub(super) fn finish(&self, sample: usize, reason: FinishReason, usage: Usage) {
        let _ = self.send(Event::Finished {
            sample,
            reason,
            stop_token: None,
            usage,
        });
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // Its tasks ended with the runtime: the client's receiver learns it from the dropped sink.
        self.client.active().remove(&self.id);
    }
}
