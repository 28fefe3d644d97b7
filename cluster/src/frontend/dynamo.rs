//! Dynamo's part of the frontend: discovery, and the pipelines to the workers. Its HTTP server is not started.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use dynamo_kv_router::KvRouterConfig;
use dynamo_llm::discovery::{ModelManager, ModelWatcher};
use dynamo_llm::entrypoint::RouterConfig;
use dynamo_llm::http::service::Metrics;
use dynamo_llm::namespace::NamespaceFilter;
use dynamo_runtime::discovery::DiscoveryQuery;
use dynamo_runtime::metrics::MetricsHierarchy;
use dynamo_runtime::pipeline::RouterMode;
use dynamo_runtime::{DistributedRuntime, Runtime};

use super::backends::Backends;
use super::discovery::Follower;
use super::probe::RequestProbe;
use crate::policy::Policy;
use crate::policy::picker;
use crate::settings::Settings;

/// What Dynamo's part needs to know.
pub struct Setup {
    /// Names of the model.
    pub names: Vec<String>,
    /// The model's folder, if it is one.
    pub folder: Option<PathBuf>,
    /// How workers are chosen.
    pub mode: RouterMode,
    /// Whether workers tell what they have cached.
    pub kv_events: bool,
    /// Time within which a new worker must answer.
    pub probe_timeout: std::time::Duration,
}

/// Takes part in discovery, and has pipelines made for the workers that answer.
///
/// # Errors
/// A discovery service that is not there, or a second frontend in this process.
pub async fn start(
    settings: &Settings,
    setup: Setup,
    policy: &Arc<Policy>,
    backends: &Arc<Backends>,
) -> Result<DistributedRuntime> {
    let config = settings.runtime_config().to_distributed_config()?;
    let connected = DistributedRuntime::new(Runtime::from_current()?, config).await;
    let runtime =
        connected.with_context(|| format!("cannot take part by {}", settings.discovery))?;
    let config = KvRouterConfig {
        use_kv_events: setup.kv_events,
        ..KvRouterConfig::default()
    };
    let config = picker::install(policy, config)?;
    let metrics = Arc::new(Metrics::new());
    register(&metrics, &runtime);
    let mut watcher = ModelWatcher::new(
        runtime.clone(),
        Arc::new(ModelManager::new()),
        RouterConfig::new(setup.mode, config),
        // Answers of lost workers are sent on by our client.
        0,
        None,
        Some(backends.factory()),
        None,
        metrics,
    );
    watcher.set_local_model_path(setup.folder);
    let probe = RequestProbe::new(runtime.clone(), setup.probe_timeout);
    let (follower, answering) = Follower::new(
        settings.namespace.clone(),
        setup.names,
        Arc::clone(policy.members()),
        Arc::new(probe),
    );
    let token = runtime.primary_token();
    let discovery = runtime.discovery();
    let events = discovery.list_and_watch(DiscoveryQuery::AllModels, Some(token));
    let events = events.await.context("discovery cannot be watched")?;
    tokio::spawn(follower.run(events));
    let namespace = NamespaceFilter::Exact(settings.namespace.clone());
    let watcher = Arc::new(watcher);
    tokio::spawn(async move { watcher.watch(answering, namespace).await });
    Ok(runtime)
}

/// Has Dynamo's counts of lost attempts in its metrics.
fn register(metrics: &Metrics, runtime: &DistributedRuntime) {
    let registry = runtime.get_metrics_registry().get_prometheus_registry();
    if let Err(error) = metrics.register(&registry) {
        tracing::warn!("Dynamo's metrics of requests are missing: {error}");
    }
}
