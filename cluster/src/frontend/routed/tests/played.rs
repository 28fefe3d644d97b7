//! An engine that plays a script in the place of Dynamo's pipeline.

use std::collections::VecDeque;

use async_trait::async_trait;
use dynamo_backend_common::DynamoError;
use dynamo_llm::protocols::common::llm_backend::LLMEngineOutput;
use dynamo_llm::protocols::common::preprocessor::PreprocessedRequest;
use dynamo_runtime::engine::{AsyncEngineContext, AsyncEngineContextProvider, ResponseStream};
use dynamo_runtime::pipeline::{AsyncEngine, Error, ManyOut, SingleIn};
use dynamo_runtime::protocols::annotated::Annotated;
use kimi_linear::engine::Event;

use super::super::*;
use crate::wire::ChunkWriter;

/// What the played worker does next.
#[derive(Clone, Debug)]
pub(super) enum Step {
    Event(Event),
    Fails(DynamoError),
    /// It waits until it is told to stop.
    UntilStopped,
    /// The connection breaks.
    Broken,
}

/// How the played pipeline takes a request.
#[derive(Clone, Debug)]
pub(super) enum Taken {
    Begins(Vec<Step>),
    Refuses(DynamoError),
    /// No response stream comes.
    Silent,
}

/// Plays a script for each request, in the order in which they come.
#[derive(Default)]
pub(super) struct Played {
    pub(super) scripts: Mutex<VecDeque<Taken>>,
    pub(super) requests: Mutex<Vec<PreprocessedRequest>>,
    pub(super) contexts: Mutex<Vec<Arc<dyn AsyncEngineContext>>>,
}

type Chunk = Annotated<LLMEngineOutput>;

fn chunk(writer: &mut ChunkWriter, step: Step) -> Option<Chunk> {
    match step {
        Step::Event(event) => match writer.write(event)? {
            Ok(chunk) => Some(Annotated::from_data(chunk)),
            Err(error) => Some(failed(error)),
        },
        Step::Fails(error) => Some(failed(error)),
        Step::UntilStopped => Some(Annotated::from_data(writer.cancelled())),
        Step::Broken => None,
    }
}

fn failed(error: DynamoError) -> Chunk {
    Annotated {
        error: Some(error),
        ..Annotated::from_error("failed")
    }
}

#[async_trait]
impl AsyncEngine<SingleIn<PreprocessedRequest>, ManyOut<Chunk>, Error> for Played {
    async fn generate(
        &self,
        request: SingleIn<PreprocessedRequest>,
    ) -> Result<ManyOut<Chunk>, Error> {
        let (request, rest) = request.into_parts();
        let context = rest.context();
        let prompt = request.token_ids.len();
        self.requests.lock().unwrap().push(request);
        self.contexts.lock().unwrap().push(Arc::clone(&context));
        let taken = self.scripts.lock().unwrap().pop_front();
        let steps = match taken.expect("a script for each request") {
            Taken::Begins(steps) => VecDeque::from(steps),
            Taken::Refuses(error) => return Err(error.into()),
            Taken::Silent => std::future::pending().await,
        };
        let state = (steps, ChunkWriter::new(prompt), Arc::clone(&context));
        let stream =
            futures::stream::unfold(state, |(mut steps, mut writer, context)| async move {
                let step = steps.pop_front()?;
                if matches!(step, Step::UntilStopped) {
                    context.stopped().await;
                    steps.clear();
                }
                let chunk = chunk(&mut writer, step)?;
                Some((chunk, (steps, writer, context)))
            });
        Ok(ResponseStream::new(Box::pin(stream), context))
    }
}

/// Knows one pipeline; without one no worker is there.
pub(super) struct OneWay(pub(super) Option<PrefillRoutedEngine>);

impl Route for OneWay {
    fn route(&self) -> Result<Routed, EngineError> {
        let engine = self.0.clone().ok_or(EngineError::Unavailable {
            reason: "no decode worker".to_owned(),
        })?;
        Ok(Routed {
            engine,
            model: "m".to_owned(),
            allowed: Some(HashSet::from([7])),
            aggregated: false,
        })
    }

    fn status(&self) -> Status {
        Status::default()
    }

    fn clear_cache(&self) -> Result<(), EngineError> {
        Ok(())
    }
}
