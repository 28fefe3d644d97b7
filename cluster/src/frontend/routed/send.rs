//! Sends one answer of a request to Dynamo, again where another worker may take it.

use std::sync::Arc;
use std::time::Duration;

use dynamo_llm::protocols::common::llm_backend::LLMEngineOutput;
use dynamo_llm::protocols::common::preprocessor::PreprocessedRequest;
use dynamo_runtime::engine::{AsyncEngineContext, AsyncEngineContextProvider};
use dynamo_runtime::pipeline::{Context, ManyOut};
use dynamo_runtime::protocols::annotated::Annotated;
use futures::{FutureExt, StreamExt};
use kimi_linear::engine::Request;
use kimi_linear::error::EngineError;
use tokio::time::Instant;

use super::error::{Again, again, engine_error, lost};
use super::shared::Shared;
use super::{Client, Routed};
use crate::wire;

/// How long a first chunk is waited for before a request counts as taken: a worker that refuses a request says so at once, and the
/// client gets an error in place of an answer that has begun.
const REFUSAL: Duration = Duration::from_millis(100);

/// The first pause before a request is tried again; each is twice as long as the one before.
const PAUSE: Duration = Duration::from_millis(100);

/// The longest pause.
const LONGEST: Duration = Duration::from_millis(500);

/// How long a request that was cancelled while it was sent may take to end.
const ENDING: Duration = Duration::from_secs(60);

/// How long a worker may take to end an answer that was stopped, or has ended: what it does then is its own affair, and the connection
/// is closed.
const GRACE: Duration = Duration::from_secs(10);

/// A request that a worker works on. It is stopped when this is dropped.
pub(super) struct Running(Arc<dyn AsyncEngineContext>);

impl Running {
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
    running: Running,
    stream: ManyOut<Annotated<LLMEngineOutput>>,
    /// A chunk that came early.
    first: Option<Annotated<LLMEngineOutput>>,
}

impl Chunks {
    /// The next chunk; `None` at the stream's end.
    pub(super) async fn next(&mut self) -> Option<Annotated<LLMEngineOutput>> {
        match self.first.take() {
            Some(first) => Some(first),
            None => self.stream.next().await,
        }
    }

    /// Has the worker stop; its last chunk still comes.
    pub(super) fn stop(&self) {
        self.running.stop();
    }

    /// Reads the stream to its end, so that Dynamo's router learns that the worker is done, and a stop gets to the worker.
    pub(super) async fn drain(mut self) {
        let rest = async { while self.stream.next().await.is_some() {} };
        if tokio::time::timeout(GRACE, rest).await.is_err() {
            tracing::debug!("a worker did not end an answer in time");
        }
    }
}

/// Why an answer was not begun.
pub(super) enum Stopped {
    /// The client cancelled the request, or it has ended.
    GivenUp,
    Failed(EngineError),
}

impl From<EngineError> for Stopped {
    fn from(error: EngineError) -> Self {
        Self::Failed(error)
    }
}

/// A try that has failed, where another may not.
struct Missed {
    error: EngineError,
    again: Again,
}

/// Sends a request with one answer, again where another worker may take it.
pub(super) async fn send(
    client: &Client,
    part: &Request,
    shared: &Shared,
) -> Result<Chunks, Stopped> {
    let deadline = Instant::now() + client.limits.retry;
    let mut at_once = client.limits.migrations;
    let mut pause = PAUSE;
    loop {
        let tried = match client.route.route() {
            Ok(routed) => attempt(client, &routed, part, shared).await?,
            Err(error) => Err(Missed {
                error,
                again: Again::Later,
            }),
        };
        let missed = match tried {
            Ok(chunks) => return Ok(chunks),
            Err(missed) => missed,
        };
        if missed.again != Again::Later && at_once > 0 {
            at_once -= 1;
            continue;
        }
        if missed.again == Again::Elsewhere || Instant::now() + pause > deadline {
            return Err(missed.error.into());
        }
        tokio::select! {
            () = shared.given_up() => return Err(Stopped::GivenUp),
            () = tokio::time::sleep(pause) => {}
        }
        pause = (2 * pause).min(LONGEST);
    }
}

/// Sends a request once.
async fn attempt(
    client: &Client,
    routed: &Routed,
    part: &Request,
    shared: &Shared,
) -> Result<Result<Chunks, Missed>, Stopped> {
    let mut sent = wire::preprocessed(&routed.model, part)?;
    if let Some(allowed) = &routed.allowed {
        let routing = sent.routing.get_or_insert_default();
        routing.allowed_worker_ids = Some(allowed.clone());
    }
    let (running, mut opening) = open(routed, sent);
    let stream = tokio::select! {
        biased;
        () = shared.given_up() => {
            // A prefill may be under way whose caches only the decode worker takes away: Dynamo has to end this in its order.
            running.stop();
            tokio::spawn(async move {
                if let Ok(Ok(stream)) = tokio::time::timeout(ENDING, opening).await {
                    Chunks { running, stream, first: None }.drain().await;
                }
            });
            return Err(Stopped::GivenUp);
        }
        opened = tokio::time::timeout(client.limits.dispatch, &mut opening) => opened,
    };
    let missed = |error: &(dyn std::error::Error + 'static)| {
        let mapped = engine_error(error, shared.running());
        match again(error) {
            Again::Never => Err(Stopped::from(mapped)),
            again => Ok(Err(Missed {
                error: mapped,
                again,
            })),
        }
    };
    let stream = match stream {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return missed(error.as_ref()),
        Err(_) => return Err(silent(client.limits.dispatch).into()),
    };
    let mut chunks = Chunks {
        running,
        stream,
        first: None,
    };
    chunks.first = match tokio::time::timeout(REFUSAL, chunks.stream.next()).await {
        Err(_) => None,
        Ok(None) => {
            return Ok(Err(Missed {
                error: lost("the worker ended the answer before it began"),
                again: Again::Soon,
            }));
        }
        Ok(Some(chunk)) => match &chunk.error {
            Some(error) => return missed(error),
            None => Some(chunk),
        },
    };
    if routed.aggregated {
        client.totals.aggregated();
    }
    Ok(Ok(chunks))
}

/// A response stream that Dynamo is about to return.
type Opening =
    futures::future::BoxFuture<'static, anyhow::Result<ManyOut<Annotated<LLMEngineOutput>>>>;

/// Gives a request to Dynamo's pipeline, under a new id.
fn open(routed: &Routed, request: PreprocessedRequest) -> (Running, Opening) {
    let request = Context::new(request);
    let running = Running(request.context());
    let engine = Arc::clone(&routed.engine);
    (
        running,
        async move { engine.generate(request).await }.boxed(),
    )
}

/// No worker has answered: the way back is the first suspect.
fn silent(after: Duration) -> EngineError {
    EngineError::Unavailable {
        reason: format!(
            "no worker has begun to answer within {} s; a worker that cannot connect to this frontend's address for answers looks like that: \
             see --dyn-host (DYN_TCP_RESPONSE_STREAM_HOST) and the workers' logs",
            after.as_secs()
        ),
    }
}
