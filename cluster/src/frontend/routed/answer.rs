//! One answer: from Dynamo's chunks to the client's events.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use dynamo_llm::protocols::common::llm_backend::LLMEngineOutput;
use dynamo_runtime::engine::AsyncEngineContext;
use dynamo_runtime::pipeline::ManyOut;
use dynamo_runtime::protocols::annotated::Annotated;
use futures::StreamExt;
use kimi_linear::engine::{Event, FinishReason, Request, Usage};
use kimi_linear::error::{EngineError, Error};

use super::error::{engine_error, lost};
use super::shared::Shared;
use crate::wire::ChunkReader;

/// How long a worker may take to end an answer that was stopped, or has ended: what it does then is its own affair, and the connection
/// is closed.
const GRACE: Duration = Duration::from_secs(10);

/// A request that a worker works on. It is stopped when this is dropped.
pub(super) struct Running(Arc<dyn AsyncEngineContext>);

impl Running {
    pub(super) fn new(context: Arc<dyn AsyncEngineContext>) -> Self {
        Self(context)
    }

    /// Has the worker stop; its last chunk still comes.
    pub(super) fn stop(&self) {
        self.0.stop_generating();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill();
    }
}

/// The chunks of an answer. The worker is stopped before the connection is closed.
pub(super) struct Chunks {
    pub(super) running: Running,
    pub(super) stream: ManyOut<Annotated<LLMEngineOutput>>,
}

/// Reads a stream to its end, so that Dynamo's router learns that the worker is done, and a stop gets to the worker.
pub(super) async fn drain(mut stream: ManyOut<Annotated<LLMEngineOutput>>, running: Running) {
    let rest = async { while stream.next().await.is_some() {} };
    if tokio::time::timeout(GRACE, rest).await.is_err() {
        tracing::debug!("a worker did not end an answer in time");
    }
    drop(running);
}

/// One answer of a request.
pub(super) struct Answer {
    shared: Arc<Shared>,
    sample: usize,
    reader: ChunkReader,
    usage: Usage,
    chunks: Chunks,
    /// A chunk that came early.
    first: Option<Annotated<LLMEngineOutput>>,
}

/// What to do after a chunk.
enum Next {
    Read,
    /// The answer has ended.
    Done,
    /// It ends here: the worker is to stop.
    Stop,
    Fail(EngineError),
}

impl Answer {
    pub(super) fn new(
        shared: Arc<Shared>,
        sample: usize,
        request: &Request,
        chunks: Chunks,
        first: Option<Annotated<LLMEngineOutput>>,
    ) -> Self {
        let prompt_tokens = request.prompt.len() - request.answered;
        Self {
            shared,
            sample,
            reader: ChunkReader::new(sample, prompt_tokens),
            usage: Usage {
                prompt_tokens,
                ..Usage::default()
            },
            chunks,
            first,
        }
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub(super) fn sample(&self) -> usize {
        self.sample
    }

    /// Passes the answer to the client, to its end.
    pub(super) async fn run(mut self) {
        let next = loop {
            let chunk = match self.first.take() {
                Some(chunk) => Some(chunk),
                None => tokio::select! {
                    biased;
                    () = self.shared.cancelled().cancelled() => {
                        let reason = FinishReason::Cancelled;
                        self.shared.finish(self.sample, reason, self.usage);
                        break Next::Stop;
                    }
                    // Another answer of the request has failed.
                    () = self.shared.over().cancelled() => break Next::Stop,
                    chunk = self.chunks.stream.next() => chunk,
                },
            };
            match self.take(chunk) {
                Next::Read => {}
                next => break next,
            }
        };
        match next {
            Next::Read | Next::Done => {}
            Next::Stop => self.chunks.running.stop(),
            Next::Fail(error) => {
                self.shared.fail(error);
                self.chunks.running.stop();
            }
        }
        drain(self.chunks.stream, self.chunks.running).await;
    }

    /// Passes the events of a chunk to the client; `None` is the end of the stream.
    fn take(&mut self, chunk: Option<Annotated<LLMEngineOutput>>) -> Next {
        let Some(chunk) = chunk else {
            return Next::Fail(lost("the answer broke off: its worker is lost"));
        };
        let data = match chunk.into_data() {
            Ok(Some(data)) => data,
            // An annotation.
            Ok(None) => return Next::Read,
            Err(error) => return Next::Fail(engine_error(&error, self.shared.running())),
        };
        let events = match self.reader.read(data) {
            Ok(events) => events,
            Err(Error::Engine(error)) => return Next::Fail(error),
            Err(error) => return Next::Fail(lost(&error.to_string())),
        };
        for event in events {
            match self.pass(event) {
                Next::Read => {}
                next => return next,
            }
        }
        Next::Read
    }

    fn pass(&mut self, event: Event) -> Next {
        let (mut is_token, mut is_end) = (false, false);
        match &event {
            Event::Prefill { cached, .. } => self.usage.cached_tokens = *cached,
            Event::Token { .. } => {
                self.usage.generated_tokens += 1;
                is_token = true;
            }
            // Nobody here has asked for that: the worker gives the request up.
            Event::Finished {
                reason: FinishReason::Cancelled,
                ..
            } => return Next::Fail(lost("the worker has given the answer up")),
            Event::Finished { .. } => is_end = true,
            _ => {}
        }
        // Progress and scores are the prompt's, of which the answers have copies.
        let is_prompts = matches!(event, Event::Prefill { .. } | Event::Scored(_));
        if is_prompts && self.sample > 0 {
            return Next::Read;
        }
        match self.shared.send(event) {
            _ if is_end => Next::Done,
            ControlFlow::Break(()) if is_token => {
                let reason = FinishReason::Stop;
                self.shared.finish(self.sample, reason, self.usage);
                Next::Stop
            }
            _ => Next::Read,
        }
    }
}
