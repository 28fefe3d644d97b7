//! The frontend's life: our HTTP server, Dynamo's pipelines behind it, and the policy between.

use std::io::Write;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use dynamo_runtime::DistributedRuntime;
use kimi_linear::llm::LlmFiles;
use kimi_linear::server::{Opener, ServedModel, Server, ServerOptions};
use tokio::runtime::Handle;

use super::backends::Backends;
use super::convert::Converter;
use super::dynamo::{self, Setup};
use super::flags::Options;
use super::routed::RoutedEngine;
use super::status::{self, Shown};
use super::telemetry::{self, Telemetry};
use super::totals::Totals;
use crate::policy::Policy;
use crate::policy::members::Members;
use crate::settings::{Program, Settings};

/// Runs a frontend until a signal or an error ends it. To be called at the beginning of `main`: it sets environment variables.
///
/// # Errors
/// Settings that cannot work, files that are missing or damaged, an address that is taken, or a discovery service that is not there.
pub fn run(options: Options) -> Result<()> {
    let settings = Settings::resolve(&options.network, Program::Frontend)?;
    let planner = options.policy.planner()?;
    settings.apply()?;
    dynamo_runtime::logging::init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .thread_name("frontend")
        .enable_all()
        .build()
        .context("cannot start the frontend's threads")?;
    let done = runtime.block_on(async {
        let files = options.model.files()?;
        let server = options.server(&files)?;
        let parts = Parts::new(&options, planner, &server)?;
        serve(options, settings, files, server, parts).await
    });
    // Connections to workers, and what Dynamo does in the background.
    runtime.shutdown_background();
    done
}

/// What the frontend consists of, apart from its servers.
struct Parts {
    policy: Arc<Policy>,
    backends: Arc<Backends>,
    telemetry: Arc<Telemetry>,
    totals: Arc<Totals>,
    converter: Arc<Converter>,
}

impl Parts {
    fn new(
        options: &Options,
        planner: crate::policy::planner::Planner,
        server: &ServerOptions,
    ) -> Result<Self> {
        let members = Arc::new(Members::default());
        let telemetry = Arc::new(Telemetry::new(Handle::current())?);
        let threshold = options.policy.threshold;
        let policy = Arc::new(Policy::new(Arc::clone(&members), planner, threshold));
        let backends = Backends::new(
            server.model_names.clone(),
            Arc::clone(&members),
            Arc::clone(&telemetry),
        );
        let converter = Converter::new(
            Arc::clone(&policy),
            Arc::clone(&telemetry),
            options.policy.no_role_changes,
        );
        Ok(Self {
            policy,
            backends,
            telemetry,
            totals: Arc::default(),
            converter,
        })
    }

    /// Watches the workers, and passes what they tell to the policy.
    async fn watch(&self) {
        let (policy, totals, converter) = (&self.policy, &self.totals, &self.converter);
        let members = Arc::clone(policy.members());
        let each = |told| {
            let answered = totals.take_answers();
            if let Some((from, to)) = policy.tick(Instant::now(), &told, &answered) {
                converter.order(from, to);
            }
        };
        telemetry::watch(Arc::clone(&self.telemetry), members, each).await;
    }

    fn shown(&self, runtime: &DistributedRuntime) -> Arc<Shown> {
        Arc::new(Shown {
            policy: Arc::clone(&self.policy),
            backends: Arc::clone(&self.backends),
            telemetry: Arc::clone(&self.telemetry),
            totals: Arc::clone(&self.totals),
            converter: Arc::clone(&self.converter),
            runtime: Some(runtime.clone()),
        })
    }

    /// Gives the model to the server.
    fn open(&self, options: &Options, files: LlmFiles, opener: &Opener) -> Result<()> {
        let route = Arc::clone(&self.backends);
        let (limits, totals) = (options.routing.limits(), Arc::clone(&self.totals));
        let engine = RoutedEngine::new(route, limits, totals, Handle::current());
        let context = options.model.context(&files)?;
        let model = ServedModel {
            files,
            engine: Arc::new(engine),
            device: None,
            context,
        };
        Ok(opener.open(model, None)?)
    }
}

async fn serve(
    options: Options,
    settings: Settings,
    files: LlmFiles,
    server: ServerOptions,
    parts: Parts,
) -> Result<()> {
    let has_key = !server.api_keys.is_empty();
    let names = server.model_names.clone();
    let server = bind(&options, server).await?;
    let status = match options.status.address() {
        None => None,
        Some(address) => {
            let bound = status::bind(address).await;
            Some(bound.with_context(|| format!("cannot listen on {address} for the status"))?)
        }
    };
    tell(&server, status.as_ref(), has_key);
    let setup = Setup {
        names,
        folder: options.model.folder().map(ToOwned::to_owned),
        mode: options.routing.mode(),
        kv_events: !options.routing.no_kv_events,
        probe_timeout: options.routing.probe_timeout,
    };
    let opener = server.opener();
    let running = server.run(signals());
    let working = async {
        let runtime = dynamo::start(&settings, setup, &parts.policy, &parts.backends).await?;
        // A vocabulary for grammars is prepared, which takes a while.
        tokio::task::block_in_place(|| parts.open(&options, files, &opener))?;
        let shown = parts.shown(&runtime);
        let status = async {
            match status {
                Some(listener) => status::serve(listener, shown).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = parts.watch() => Ok(()),
            ended = status => ended.context("the status port has failed"),
            () = ended(&runtime) => anyhow::bail!("Dynamo's runtime has ended; the log says why"),
        }
    };
    tokio::select! {
        () = running => Ok(()),
        ended = working => ended,
    }
}

/// Waits until Dynamo gives up, as after the loss of its lease.
async fn ended(runtime: &DistributedRuntime) {
    runtime.primary_token().cancelled().await;
}

/// Listens on the Unix socket, or the address, that the flags name.
async fn bind(options: &Options, server: ServerOptions) -> Result<Server> {
    let http = &options.http;
    if let Some(path) = &http.uds {
        let bound = Server::bind_unix(path, server).await;
        return bound.with_context(|| format!("--uds: cannot listen on {}", path.display()));
    }
    let (host, port) = (http.http_host.as_str(), http.port);
    let bound = Server::bind((host, port), server).await;
    bound.with_context(|| format!("cannot listen on {host}:{port}"))
}

/// Says where the server listens: with port 0 the user reads here which port it is.
fn tell(server: &Server, status: Option<&tokio::net::TcpListener>, has_key: bool) {
    let mut lines = vec![format!("listening on {}", server.url())];
    let status = status.and_then(|status| status.local_addr().ok());
    lines.extend(status.map(|address| format!("status on http://{address}")));
    for line in lines {
        // A server that cannot say it serves all the same.
        if let Err(error) = writeln!(std::io::stdout(), "{line}") {
            tracing::warn!("{line} (stdout cannot be written: {error})");
        }
    }
    let address = server.address().filter(|it| !it.ip().is_loopback());
    if let Some(address) = address.filter(|_| !has_key) {
        tracing::warn!(
            "without an API key anyone who can reach {address} may use this server: set --api-key or KIMI_LINEAR_API_KEY, or use --host 127.0.0.1"
        );
    }
    if let Some(address) = status.filter(|address| !address.ip().is_loopback()) {
        tracing::warn!("anyone who can reach {address} may move the threshold: it asks for no key");
    }
}

/// Waits for the first signal; the second exits.
async fn signals() {
    interrupted().await;
    tokio::spawn(async {
        interrupted().await;
        std::process::exit(1);
    });
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
