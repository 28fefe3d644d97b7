//! Sends requests to Dynamo: all that come together are taken, or none.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use dynamo_llm::protocols::common::llm_backend::LLMEngineOutput;
use dynamo_llm::protocols::common::preprocessor::PreprocessedRequest;
use dynamo_runtime::engine::{AsyncEngineContext, AsyncEngineContextProvider};
use dynamo_runtime::pipeline::{Context, ManyOut};
use dynamo_runtime::protocols::annotated::Annotated;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use kimi_linear::engine::{Event, FinishReason, Request, Usage};
use kimi_linear::error::EngineError;
use tokio::time::Instant;

use super::answer::{Answer, Chunks, Running, drain};
use super::error::{engine_error, is_passing, lost};
use super::shared::Shared;
use super::{Client, Routed};
use crate::wire;

/// How long a first chunk is waited for before a request counts as taken: a worker that refuses a request says so at once, and the
/// client gets an error in place of an answer that has begun.
const REFUSAL: Duration = Duration::from_millis(100);

/// The first pause before a request is tried again; each is twice as long as the one before.
const PAUSE: Duration = Duration::from_millis(100);

/// How long a request that was cancelled while it was sent may take to end.
const ENDING: Duration = Duration::from_secs(60);

/// Why an answer was not begun.
enum Stopped {
    /// The client cancelled the request.
    Cancelled,
    Failed(EngineError),
}

impl From<EngineError> for Stopped {
    fn from(error: EngineError) -> Self {
        Self::Failed(error)
    }
}

/// Sends requests that came together, and starts a task for each answer.
pub(super) async fn run(client: Arc<Client>, submitted: Vec<(Request, Arc<Shared>)>) {
    match admit(&client, &submitted).await {
        Ok(answers) => {
            for (_, shared) in &submitted {
                // One that the client has cancelled ends below, or has no answer that began.
                let _: ControlFlow<()> = shared.send(Event::Queued { ahead: 0 });
            }
            let begun: Vec<_> = answers
                .iter()
                .map(|answer| (answer.shared().id(), answer.sample()))
                .collect();
            for (request, shared) in &submitted {
                for sample in 0..shared.samples() {
                    if !begun.contains(&(shared.id(), sample)) {
                        shared.finish(sample, FinishReason::Cancelled, usage(request));
                    }
                }
            }
            for answer in answers {
                tokio::spawn(answer.run());
            }
        }
        Err(error) => {
            for (_, shared) in &submitted {
                shared.fail(error.clone());
            }
        }
    }
}

/// The usage of an answer that was not begun.
fn usage(request: &Request) -> Usage {
    Usage {
        prompt_tokens: request.prompt.len() - request.answered,
        ..Usage::default()
    }
}

/// Sends all answers of all requests. Those of cancelled requests are missing from what is returned.
async fn admit(
    client: &Arc<Client>,
    submitted: &[(Request, Arc<Shared>)],
) -> Result<Vec<Answer>, EngineError> {
    let mut answers = Vec::new();
    let mut dispatches = FuturesUnordered::new();
    for (request, shared) in submitted {
        for sample in 0..shared.samples() {
            let shared = Arc::clone(shared);
            dispatches.push(dispatch(client, request, sample, shared));
        }
    }
    while let Some(dispatched) = dispatches.next().await {
        match dispatched {
            Ok(answer) => answers.push(answer),
            Err(Stopped::Cancelled) => {}
            // What was sent already is stopped when it is dropped.
            Err(Stopped::Failed(error)) => return Err(error),
        }
    }
    Ok(answers)
}

/// Sends one answer of a request, again where no worker can take it at the moment.
async fn dispatch(
    client: &Client,
    request: &Request,
    sample: usize,
    shared: Arc<Shared>,
) -> Result<Answer, Stopped> {
    let part = Request {
        samples: 1,
        first_sample: request.first_sample + sample,
        ..request.clone()
    };
    // Without workers there is nothing to wait for.
    let mut routed = client.route.route();
    let deadline = Instant::now() + client.limits.retry;
    let mut pause = PAUSE;
    if let Err(error) = &routed {
        return Err(error.clone().into());
    }
    loop {
        let tried = match &routed {
            Ok(routed) => send(client, routed, &part, &shared).await?,
            Err(error) => Err(error.clone()),
        };
        match tried {
            Ok((chunks, first)) => return Ok(Answer::new(shared, sample, &part, chunks, first)),
            Err(error) if Instant::now() + pause > deadline => return Err(error.into()),
            Err(_) => {}
        }
        tokio::select! {
            () = shared.cancelled().cancelled() => return Err(Stopped::Cancelled),
            () = tokio::time::sleep(pause) => {}
        }
        pause *= 2;
        routed = client.route.route();
    }
}

/// A response stream, and its first chunk if that came at once.
type Begun = (Chunks, Option<Annotated<LLMEngineOutput>>);

/// Sends a request once. The inner error is one after which another try may succeed.
async fn send(
    client: &Client,
    routed: &Routed,
    part: &Request,
    shared: &Arc<Shared>,
) -> Result<Result<Begun, EngineError>, Stopped> {
    let mut sent = wire::preprocessed(&routed.model, part)?;
    if let Some(allowed) = &routed.allowed {
        let routing = sent.routing.get_or_insert_default();
        routing.allowed_worker_ids = Some(allowed.clone());
    }
    if routed.aggregated {
        client.totals.aggregated();
    }
    let opened = open(routed, sent);
    let context = opened.0;
    let running = Running::new(Arc::clone(&context));
    let mut opening = opened.1;
    let stream = tokio::select! {
        biased;
        () = shared.cancelled().cancelled() => {
            // A prefill may be under way whose caches only the decode worker takes away: Dynamo has to end this in its order.
            running.stop();
            tokio::spawn(async move {
                if let Ok(Ok(stream)) = tokio::time::timeout(ENDING, opening).await {
                    drain(stream, running).await;
                }
            });
            return Err(Stopped::Cancelled);
        }
        opened = tokio::time::timeout(client.limits.dispatch, &mut opening) => opened,
    };
    let mut stream = match stream {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            let mapped = engine_error(error.as_ref(), shared.running());
            return match is_passing(error.as_ref()) {
                true => Ok(Err(mapped)),
                false => Err(mapped.into()),
            };
        }
        Err(_) => return Err(silent(client.limits.dispatch).into()),
    };
    let first = match tokio::time::timeout(REFUSAL, stream.next()).await {
        Err(_) => None,
        Ok(None) => {
            let error = lost("the worker ended the answer before it began");
            return Err(error.into());
        }
        Ok(Some(chunk)) => Some(chunk),
    };
    if let Some(error) = first.as_ref().and_then(|chunk| chunk.error.as_ref()) {
        return Err(engine_error(error, shared.running()).into());
    }
    Ok(Ok((Chunks { stream, running }, first)))
}

/// A response stream that Dynamo is about to return.
type Opening =
    futures::future::BoxFuture<'static, anyhow::Result<ManyOut<Annotated<LLMEngineOutput>>>>;

/// Gives a request to Dynamo's pipeline.
fn open(routed: &Routed, request: PreprocessedRequest) -> (Arc<dyn AsyncEngineContext>, Opening) {
    let request = Context::new(request);
    let context = request.context();
    let engine = Arc::clone(&routed.engine);
    (
        context,
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
