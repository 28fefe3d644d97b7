//! The probe over Dynamo's request plane: a worker in this process, found through a folder.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use dynamo_backend_common::{BackendError, DynamoError, ErrorType};
use dynamo_llm::protocols::common::llm_backend::LLMEngineOutput;
use dynamo_llm::protocols::common::preprocessor::PreprocessedRequest;
use dynamo_runtime::discovery::{EventTransportKind, ModelCardInstanceId};
use dynamo_runtime::distributed::{DiscoveryBackend, DistributedConfig, RequestPlaneMode};
use dynamo_runtime::pipeline::network::Ingress;
use dynamo_runtime::pipeline::{AsyncEngine, Error, ManyOut, SingleIn};
use dynamo_runtime::protocols::annotated::Annotated;
use dynamo_runtime::storage::kv::Selector;
use dynamo_runtime::{DistributedRuntime, Runtime};
use kimi_linear_cluster::frontend::probe::{Probe, RequestProbe};

/// How a worker takes the probe.
#[derive(Clone, Copy)]
enum Worker {
    /// It refuses an empty prompt, as ours does.
    Refuses,
    /// Its answer never gets here.
    Silent,
    /// Its engine is broken.
    Broken,
}

#[async_trait]
impl AsyncEngine<SingleIn<PreprocessedRequest>, ManyOut<Annotated<LLMEngineOutput>>, Error>
    for Worker
{
    async fn generate(
        &self,
        request: SingleIn<PreprocessedRequest>,
    ) -> Result<ManyOut<Annotated<LLMEngineOutput>>, Error> {
        assert!(request.token_ids.is_empty() && request.is_probe);
        let kind = match self {
            Self::Refuses => BackendError::InvalidArgument,
            Self::Broken => BackendError::EngineShutdown,
            Self::Silent => std::future::pending().await,
        };
        let error = DynamoError::builder().error_type(ErrorType::Backend(kind));
        Err(error.message("no tokens").build().into())
    }
}

async fn runtime(folder: &std::path::Path) -> DistributedRuntime {
    let config = DistributedConfig {
        discovery_backend: DiscoveryBackend::KvStore(Selector::File(folder.to_owned())),
        nats_config: None,
        request_plane: RequestPlaneMode::Tcp,
        response_plane: None,
        event_transport_kind: EventTransportKind::Zmq,
    };
    let runtime = Runtime::from_current().unwrap();
    DistributedRuntime::new(runtime, config).await.unwrap()
}

/// What the probe says of a worker that is started for it.
async fn ask(
    (here, there): &(DistributedRuntime, DistributedRuntime),
    name: &str,
    worker: Worker,
) -> Result<(), String> {
    let component = there.namespace("n").unwrap().component(name).unwrap();
    let ingress = Ingress::for_engine(Arc::new(worker)).unwrap();
    let endpoint = component.endpoint("generate").endpoint_builder();
    let started = endpoint.handler(ingress).start_with_registration().await;
    let id = ModelCardInstanceId {
        namespace: "n".to_owned(),
        component: name.to_owned(),
        endpoint: "generate".to_owned(),
        instance_id: started.unwrap().instance().instance_id,
        model_suffix: None,
    };
    let probe = RequestProbe::new(here.clone(), Duration::from_secs(2));
    let limited = |id| {
        let asked = probe.ask("m", id);
        tokio::time::timeout(Duration::from_secs(30), asked)
    };
    let asked = limited(&id).await.unwrap();
    let missing = ModelCardInstanceId {
        instance_id: 1,
        ..id.clone()
    };
    // A worker that is not there is waited for, and not for ever.
    assert!(limited(&missing).await.unwrap().is_err());
    asked
}

/// One test: Dynamo's servers are one for each process, and end with the first runtime that does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_that_answer_are_told_from_those_that_do_not() {
    let folder = tempfile::tempdir().unwrap();
    let runtimes = (runtime(folder.path()).await, runtime(folder.path()).await);
    assert_eq!(ask(&runtimes, "refuses", Worker::Refuses).await, Ok(()));
    let reason = ask(&runtimes, "silent", Worker::Silent).await.unwrap_err();
    assert!(reason.contains("--dyn-host"), "{reason}");
    assert!(reason.contains("within 2 s"), "{reason}");
    let reason = ask(&runtimes, "broken", Worker::Broken).await.unwrap_err();
    assert!(reason.contains("cannot be asked"), "{reason}");
    runtimes.0.shutdown();
    runtimes.1.shutdown();
}
