//! The life of a worker: one runtime, one model, and one role after the other.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use dynamo_backend_common::{DisaggregationMode, Worker, WorkerConfig};
use dynamo_runtime::{DistributedRuntime, Runtime};
use kimi_linear::checkpoint::ModelFiles;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::engine::WorkerEngine;
use super::options::Options;
use super::shared::Shared;
use crate::settings::{Program, Settings};
use crate::wire::Role;

/// How long Dynamo's runtime has for its own end.
const TEARDOWN: Duration = Duration::from_secs(5);

/// Runs a worker until a signal or an error ends it. To be called at the beginning of `main`: it sets environment variables.
///
/// # Errors
/// Settings that cannot work, a model that cannot be loaded, or a discovery service that is not there.
pub fn run(options: Options) -> Result<()> {
    let settings = Settings::resolve(&options.network, Program::Worker)?;
    let shared = Shared::new(options, settings.host)?;
    settings.apply()?;
    dynamo_runtime::logging::init();
    let runtime = Runtime::from_settings()?;
    let handle = runtime.secondary();
    handle.block_on(serve(&runtime, &shared, &settings))
}

async fn serve(runtime: &Runtime, shared: &Arc<Shared>, settings: &Settings) -> Result<()> {
    let stop = CancellationToken::new();
    tokio::spawn(signals(stop.clone()));
    let config = settings.runtime_config().to_distributed_config()?;
    let connected = tokio::select! {
        connected = DistributedRuntime::new(runtime.clone(), config) => connected,
        () = stop.cancelled() => return Ok(()),
    };
    let discovery = &settings.discovery;
    let connected = connected.with_context(|| format!("cannot take part by {discovery}"))?;
    control(&connected, shared, settings)?;
    let ended = roles(shared, &connected, settings, &stop).await;
    shared
        .finish(shared.options().place.shutdown_timeout())
        .await;
    runtime.shutdown();
    let teardown = runtime.primary_token();
    if tokio::time::timeout(TEARDOWN, teardown.cancelled())
        .await
        .is_err()
    {
        tracing::debug!("the runtime did not end within {TEARDOWN:?}");
    }
    connected.discovery().shutdown();
    ended
}

/// Cancels the token with the first signal, and exits with the second.
async fn signals(stop: CancellationToken) {
    interrupted().await;
    tracing::info!("leaving the cluster; a second signal exits at once");
    stop.cancel();
    interrupted().await;
    std::process::exit(1);
}

/// Ctrl-C, or what a service manager sends.
async fn interrupted() {
    use tokio::signal::unix::{SignalKind, signal};
    match signal(SignalKind::terminate()) {
        Ok(mut terminate) => tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            _ = terminate.recv() => {}
        },
        Err(_) => {
            let _ = tokio::signal::ctrl_c().await;
        }
    }
}

/// Says where health, metrics and control are.
fn control(connected: &DistributedRuntime, shared: &Shared, settings: &Settings) -> Result<()> {
    let Some(server) = connected.system_status_server_info() else {
        ensure!(
            !settings.system_server,
            "cannot listen for health, metrics and control: see the error above, and choose another --system-port"
        );
        return Ok(());
    };
    let url = format!("http://{}", server.advertised_socket_addr());
    tracing::info!("health, metrics and control at {url}");
    shared.controlled_at(url);
    Ok(())
}

/// One role after the other, until `stop` is cancelled or one fails.
async fn roles(
    shared: &Arc<Shared>,
    connected: &DistributedRuntime,
    settings: &Settings,
    stop: &CancellationToken,
) -> Result<()> {
    let mut orders = shared.orders();
    let mut role = shared.options().place.role();
    loop {
        let engine = Arc::new(WorkerEngine::new(Arc::clone(shared), role));
        let end = stop.child_token();
        let config = config(shared.options(), &settings.namespace, role)?;
        let worker = Worker::new(engine.clone(), config);
        let worker = worker.run_with_drt(connected.clone(), end.clone());
        tokio::pin!(worker);
        let next = tokio::select! {
            ended = &mut worker => {
                engine.leave_discovery().await;
                return Ok(ended?);
            }
            next = ordered(&mut orders, role) => Some(next),
            () = shared.engine_lost() => None,
        };
        if let Some(next) = next {
            tracing::info!("the {role} worker becomes a {next} worker");
            engine.goes_on();
        }
        end.cancel();
        let (ended, ()) = tokio::join!(worker, engine.leave_discovery());
        ended?;
        role = match next {
            None => bail!("the engine has stopped; the log says why"),
            Some(_) if stop.is_cancelled() => return Ok(()),
            Some(next) => next,
        };
    }
}

/// Waits for an order of another role than this one.
async fn ordered(orders: &mut watch::Receiver<Option<Role>>, role: Role) -> Role {
    loop {
        let next = *orders.borrow_and_update();
        if let Some(next) = next.filter(|next| *next != role) {
            return next;
        }
        if orders.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// How Dynamo registers a worker in this role.
fn config(options: &Options, namespace: &str, role: Role) -> Result<WorkerConfig> {
    let mode = match role {
        Role::Prefill => DisaggregationMode::Prefill,
        Role::Decode => DisaggregationMode::Decode,
        Role::Both => DisaggregationMode::Aggregated,
    };
    let (path, name) = (options.model.path()?, options.model.name());
    // Dynamo reads the tokenizer of a folder, and nothing of a GGUF.
    let model_name = match ModelFiles::open(&path)? {
        ModelFiles::Folder(folder) => folder.to_string_lossy().into_owned(),
        _ => String::new(),
    };
    Ok(WorkerConfig {
        namespace: namespace.to_owned(),
        component: mode.discovery_component().to_owned(),
        endpoint: "generate".to_owned(),
        model_name,
        served_model_name: Some(name.clone()),
        endpoint_types: options.place.endpoint_types.clone(),
        metrics_labels: vec![("model".to_owned(), name)],
        disaggregation_mode: mode,
        ..WorkerConfig::default()
    })
}
