//! Asks a new worker whether its answers get here.
//!
//! A worker connects back to this process for each answer. Where it cannot (an address that its network does not reach, a firewall), Dynamo
//! reports no error to either side, and a request waits for ever. So no request is sent to a worker before it has answered one that costs it
//! nothing: a prompt without tokens, which it refuses.

use std::collections::HashMap;
use std::error::Error as StdError;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use dynamo_llm::protocols::common::llm_backend::LLMEngineOutput;
use dynamo_llm::protocols::common::preprocessor::PreprocessedRequest;
use dynamo_llm::protocols::common::{OutputOptions, SamplingOptions, StopConditions};
use dynamo_runtime::DistributedRuntime;
use dynamo_runtime::discovery::ModelCardInstanceId;
use dynamo_runtime::engine::AsyncEngineContextProvider;
use dynamo_runtime::error::{DynamoError, ErrorClass};
use dynamo_runtime::pipeline::{Context, PushRouter, RouterMode};
use dynamo_runtime::protocols::annotated::Annotated;
use tokio::sync::Mutex;

/// Asks a worker whether its answers get here.
#[async_trait]
pub trait Probe: Send + Sync + 'static {
    /// Returns once it has answered.
    ///
    /// # Errors
    /// What is wrong, and what to set.
    async fn ask(&self, model: &str, worker: &ModelCardInstanceId) -> Result<(), String>;
}

type Router = PushRouter<PreprocessedRequest, Annotated<LLMEngineOutput>>;

/// Asks over Dynamo's request plane, as a request goes.
pub struct RequestProbe {
    runtime: DistributedRuntime,
    within: Duration,
    /// One router for each endpoint: each keeps tasks of its own.
    routers: Mutex<HashMap<String, Arc<Router>>>,
}

impl RequestProbe {
    /// A probe that waits this long for an answer.
    #[must_use]
    pub fn new(runtime: DistributedRuntime, within: Duration) -> Self {
        Self {
            runtime,
            within,
            routers: Mutex::default(),
        }
    }

    async fn router(&self, worker: &ModelCardInstanceId) -> anyhow::Result<Arc<Router>> {
        let name = endpoint_name(worker);
        let mut routers = self.routers.lock().await;
        if let Some(router) = routers.get(&name) {
            return Ok(Arc::clone(router));
        }
        let component = self
            .runtime
            .namespace(&worker.namespace)?
            .component(&worker.component)?;
        let client = component.endpoint(&worker.endpoint).client().await?;
        // A worker that does not answer here is not to be put aside by Dynamo's own means, which let it in again by themselves.
        let router = Router::from_client_no_fault_detection(client, RouterMode::RoundRobin).await?;
        let router = Arc::new(router);
        routers.insert(name, Arc::clone(&router));
        Ok(router)
    }

    /// Waits until the worker's endpoint is there too: its card and its endpoint are two records.
    async fn send(&self, model: &str, worker: &ModelCardInstanceId) -> anyhow::Result<()> {
        let router = self.router(worker).await?;
        while !router.client.is_instance_live(worker.instance_id) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let request = Context::new(request(model)?);
        let context = request.context();
        let answer = router.direct(request, worker.instance_id).await;
        context.kill();
        match answer {
            Ok(_) => Ok(()),
            Err(error) if is_refusal(error.as_ref()) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn silent(&self) -> String {
        let address = match self.runtime.tcp_server().await {
            Ok(server) => server.local_address().ok(),
            Err(_) => None,
        };
        let address = address.map_or_else(String::new, |address| format!(" {address}"));
        format!(
            "it has not answered within {} s: it cannot reach this frontend's address for answers{address}, or hangs; give an address that \
             it reaches with --dyn-host (DYN_TCP_RESPONSE_STREAM_HOST)",
            self.within.as_secs_f64()
        )
    }
}

/// The name of a worker's endpoint.
#[must_use]
pub fn endpoint_name(worker: &ModelCardInstanceId) -> String {
    format!(
        "{}/{}/{}",
        worker.namespace, worker.component, worker.endpoint
    )
}

/// A prompt without tokens.
fn request(model: &str) -> anyhow::Result<PreprocessedRequest> {
    let request = PreprocessedRequest::builder()
        .model(model.to_owned())
        .token_ids(Vec::<u32>::new())
        .stop_conditions(StopConditions {
            max_tokens: Some(1),
            ..StopConditions::default()
        })
        .sampling_options(SamplingOptions::default())
        .output_options(OutputOptions::default())
        .is_probe(true)
        .build();
    Ok(request?)
}

/// Whether the worker itself has refused the request: then its answer has got here.
fn is_refusal(error: &(dyn StdError + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        let found = error.downcast_ref::<DynamoError>();
        if found.is_some_and(|error| error.class() == ErrorClass::InvalidRequest) {
            return true;
        }
        next = error.source();
    }
    false
}

#[async_trait]
impl Probe for RequestProbe {
    async fn ask(&self, model: &str, worker: &ModelCardInstanceId) -> Result<(), String> {
        match tokio::time::timeout(self.within, self.send(model, worker)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(format!("it cannot be asked: {error:#}")),
            Err(_) => Err(self.silent().await),
        }
    }
}
