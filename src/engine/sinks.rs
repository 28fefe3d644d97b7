//! The sinks of submitted requests, and the delivery of the engine's events to them.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use super::core::Engine;
use super::event::{Event, Sink};
use super::request::RequestId;
use crate::error::Error;

/// The sinks of requests, with the number of answers that are unfinished.
#[derive(Default)]
pub(super) struct Sinks(HashMap<RequestId, (Sink, usize)>);

impl Sinks {
    /// Keeps the sink of a request that was queued for so many answers, or notifies it that the request was refused.
    pub(super) fn submitted(
        &mut self,
        engine: &mut Engine,
        id: RequestId,
        answers: usize,
        mut sink: Sink,
        submitted: Result<(), Error>,
    ) {
        match submitted {
            Ok(()) => {
                self.0.insert(id, (sink, answers));
            }
            Err(error) => {
                let _ = sink(Event::Failed(Arc::new(error)));
            }
        }
        self.deliver(engine);
    }

    /// Passes the engine's events to their sinks. An answer whose sink breaks is stopped.
    pub(super) fn deliver(&mut self, engine: &mut Engine) {
        while let Some((id, event)) = engine.events.pop_front() {
            let Some((sink, left)) = self.0.get_mut(&id) else {
                continue;
            };
            let mut token_of = None;
            match &event {
                Event::Token { sample, .. } => token_of = Some(*sample),
                Event::Finished { .. } => *left = left.saturating_sub(1),
                Event::Failed(_) => *left = 0,
                _ => {}
            }
            let done = *left == 0;
            let flow = sink(event);
            if done {
                self.0.remove(&id);
            }
            if let (ControlFlow::Break(()), Some(sample)) = (flow, token_of) {
                engine.stop(id, sample);
            }
        }
    }
}
