//! `kimi-linear serve`: an HTTP server for OpenAI's clients.

mod config_file;
mod flags;
mod kv_transfer;
mod memory;
mod sampling;
mod tls;
mod vllm;

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::Args;
use kimi_linear::backend::{Backend, Device, host_memory};
use kimi_linear::config::ModelConfig;
use kimi_linear::connector::{Connector, KvTransfer};
use kimi_linear::data_parallel::DataParallelOptions;
use kimi_linear::engine::{EngineHandle, EngineOptions, MemoryPlanner};
use kimi_linear::error::TokenizerError;
use kimi_linear::llm::{CONTEXT, LlmFiles, LlmOptions};
use kimi_linear::server::{Opener, ServedModel, Server, ServerOptions};

pub(super) use self::config_file::with_config;
pub(super) use self::flags::LogFormat;
use self::flags::{Caching, Engines, Http, Logs, SchedulingPolicy};
use self::kv_transfer::KvFlags;
use self::sampling::Sampling;
use self::vllm::Vllm;
use super::data_parallel;
use super::offload::Placed;
use super::options::{DeviceOptions, ModelOptions, WeightOptions, load};
use super::parallel;

/// Options of `serve`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    /// The model, as with --model.
    #[arg(value_name = "MODEL", conflicts_with = "model")]
    model_path: Option<PathBuf>,
    /// YAML file with flags, such as `port: 8000`. Flags on the command line win.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    weights: WeightOptions,
    #[command(flatten)]
    device: DeviceOptions,
    #[command(flatten)]
    http: Http,
    #[command(flatten)]
    sampling: Sampling,
    #[command(flatten)]
    engine: Engines,
    #[command(flatten)]
    caching: Caching,
    #[command(flatten)]
    transfers: KvFlags,
    #[command(flatten)]
    logs: Logs,
    #[command(flatten)]
    vllm: Vllm,
}

const AFTER_HELP: &str = "\
Example:
  kimi-linear serve --model Kimi-Linear --port 8000 --max-model-len 128K --api-key KEY

Flags with vLLM's names have vLLM's meaning. Numbers of tokens may have a unit: K and M are powers of 1,024, k and m of 1,000. \
Ctrl-C or SIGTERM finishes running answers and refuses new requests; a second signal exits at once.";

impl Arguments {
    /// How the log is written.
    pub(crate) fn log_format(&self) -> LogFormat {
        self.logs.log_format
    }

    fn server_options(&self) -> Result<ServerOptions> {
        Ok(ServerOptions {
            seed: self.engine.seed,
            priorities: self.engine.scheduling_policy == SchedulingPolicy::Priority,
            prefix_caching: self.caching.prefix_caching(),
            on_idle: Some(memory::trim),
            log_requests: self.logs.enable_log_requests,
            log_content: self.logs.log_content,
            reasoning_parser: self.vllm.reasoning_parser,
            sampling_defaults: self.sampling.defaults(&self.model.files()?)?,
            ..self.http.options(&self.model.name())?
        })
    }
}

pub(crate) fn run(mut arguments: Arguments) -> Result<()> {
    memory::share_arena();
    arguments.vllm.check()?;
    if arguments.model_path.is_none() && arguments.model.is_demo() {
        arguments.http.check_lists()?;
    }
    if let Some(path) = arguments.model_path.take() {
        arguments.model = arguments.model.of(path);
    }
    // Errors in the model's files are reported before the port is opened.
    let config = arguments.model.config()?;
    let transfers = arguments.transfers.config()?;
    arguments.engine.check(&config, transfers.is_some())?;
    if arguments.engine.nodes.is_headless() {
        let files = arguments.model.llm(None, arguments.weights)?;
        let (device, degrees) = (&arguments.device, arguments.engine.parallel.degrees());
        let checkpoint = files.checkpoint()?;
        let nodes = &arguments.engine.nodes;
        return nodes.serve(device, &files.config, &checkpoint, degrees);
    }
    // Each client is an open file.
    let _ = rlimit::increase_nofile_limit(u64::MAX);
    // Threads without a name inherit that of the thread that starts them: those of the pool would have the engine's.
    let pool = rayon::ThreadPoolBuilder::new().thread_name(|index| format!("cpu-{index}"));
    pool.build_global()
        .context("cannot start the threads that compute")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .thread_name("http")
        .enable_all()
        .build()
        .context("cannot start the server's threads")?;
    let done = runtime.block_on(serve(Arc::new(arguments), transfers));
    // A model that is still being loaded is not waited for.
    runtime.shutdown_background();
    done
}

async fn serve(arguments: Arc<Arguments>, transfers: Option<KvTransfer>) -> Result<()> {
    let options = arguments.server_options()?;
    let name = options.model_names.join(", ");
    let has_key = !options.api_keys.is_empty();
    let server = bind(&arguments.http, options).await?;
    let base = server.url();
    // With port 0 the user reads here which port it is. A server that cannot say it serves all the same.
    let listening = format!("listening on {base}");
    if let Err(error) = writeln!(std::io::stdout(), "{listening}") {
        tracing::warn!("{listening} (stdout cannot be written: {error})");
    }
    tracing::info!("loading {name}");
    arguments.vllm.tell();
    let reachable = server
        .address()
        .filter(|address| !address.ip().is_loopback());
    if let Some(address) = reachable.filter(|_| !has_key) {
        tracing::warn!(
            "without an API key anyone who can reach {address} may use this server: set --api-key or KIMI_LINEAR_API_KEY, or use --host 127.0.0.1"
        );
    }
    let opener = server.opener();
    let running = server.run(async {
        interrupted().await;
        tokio::spawn(async {
            interrupted().await;
            std::process::exit(1);
        });
    });
    let opening = {
        let arguments = Arc::clone(&arguments);
        tokio::task::spawn_blocking(move || open(&arguments, transfers, &opener))
    };
    let failed = async {
        match opening.await {
            Ok(Ok(())) => {
                match arguments.http.uds {
                    None => tracing::info!("serving {name} at {base}/v1; a chat page at {base}/"),
                    Some(_) => tracing::info!("serving {name} at {base}"),
                }
                tracing::info!("try: {}", example(&arguments.http, &base, has_key));
                std::future::pending().await
            }
            Ok(Err(error)) => error,
            Err(error) => anyhow::Error::from(error).context("the model could not be loaded"),
        }
    };
    tokio::select! {
        error = failed => Err(error),
        () = running => Ok(()),
    }
}

/// Listens on the Unix socket, or the address, that the flags name.
async fn bind(http: &Http, options: ServerOptions) -> Result<Server> {
    if let Some(path) = &http.uds {
        #[cfg(unix)]
        return Server::bind_unix(path, options)
            .await
            .with_context(|| format!("--uds: cannot listen on {}", path.display()));
        #[cfg(not(unix))]
        anyhow::bail!("--uds {}: this system has no Unix sockets", path.display());
    }
    let (host, port) = (http.host.as_str(), http.port);
    Server::bind((host, port), options)
        .await
        .with_context(|| format!("cannot listen on {host}:{port}"))
}

/// A first request for the command line.
fn example(http: &Http, base: &str, has_key: bool) -> String {
    let to = match &http.uds {
        Some(path) => format!("--unix-socket {} http://localhost", path.display()),
        None => base.to_owned(),
    };
    let key = if has_key {
        " -H 'Authorization: Bearer KEY'"
    } else {
        ""
    };
    let body = r#"{"messages": [{"role": "user", "content": "Hello"}]}"#;
    format!("curl {to}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'")
}

/// Ctrl-C, or what a service manager sends.
async fn interrupted() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = terminate.recv() => {}
            }
            return;
        }
    }
    let _ = tokio::signal::ctrl_c().await;
}

/// Loads the model and gives it to the server.
fn open(arguments: &Arguments, transfers: Option<KvTransfer>, opener: &Opener) -> Result<()> {
    let template = match arguments.model.template() {
        Ok(template) => Some(template),
        Err(error) => match error.downcast_ref() {
            Some(TokenizerError::NoTemplate { .. }) => {
                tracing::warn!("{error}: there will be no chats");
                None
            }
            _ => return Err(error),
        },
    };
    let files = arguments.model.llm(template, arguments.weights)?;
    if arguments.engine.replicas.count() > 1 {
        return open_replicas(arguments, files, opener);
    }
    let parallel = arguments.engine.parallel;
    let nodes = &arguments.engine.nodes;
    let device = parallel.open(&arguments.device, nodes, &files.config, || {
        Ok(files.checkpoint()?)
    })?;
    let Placed {
        mut backend,
        host_bytes,
    } = place(arguments, &files, device)?;
    let weights = files.checkpoint()?.total_bytes() - host_bytes;
    let memory = arguments.engine.offload.budget(&mut *backend);
    let planner = MemoryPlanner {
        memory,
        weights: parallel::heaviest(&files.config, arguments.engine.parallel.degrees(), weights)?,
        ..planner(arguments, &files.config, backend.device())?
    };
    let sizes = planner.sizes(&files.config)?;
    // On a CPU the model and the swap space share the host's memory; with a GPU the swap space has all that experts leave.
    let left = match backend.device().backend {
        "cpu" => planner.left(&files.config, &sizes),
        _ => host_memory()
            .map(|memory| arguments.engine.offload.part(memory))
            .map(|memory| memory.saturating_sub(host_bytes)),
    };
    let options = LlmOptions {
        sizes,
        cache: arguments.engine.cache.named(),
        engine: engine_options(arguments, arguments.caching.host_bytes(left)),
    };
    let llm = load(files, backend, &options)?;
    tracing::info!(
        backend = llm.device().backend,
        device = llm.device().name,
        context = llm.context(),
        sequences = sizes.sequences,
        blocks = sizes.blocks,
        "ready"
    );
    let connector = transfers.map(|transfers| start(llm.engine(), transfers));
    opener.open(llm.into(), connector.transpose()?)?;
    Ok(())
}

/// The options of an engine with this much host memory for caches.
fn engine_options(arguments: &Arguments, host_bytes: u64) -> EngineOptions {
    EngineOptions {
        host_bytes,
        queue: arguments.engine.max_queue,
        async_scheduling: !arguments.engine.no_async_scheduling,
        prompt_lookup: arguments.engine.speculative.lookup(),
        ..EngineOptions::default()
    }
}

/// Loads the replicas of a model and gives them to the server.
fn open_replicas(arguments: &Arguments, files: LlmFiles, opener: &Opener) -> Result<()> {
    let (engine, replicas) = (&arguments.engine, arguments.engine.replicas);
    let mut devices = replicas.open(&arguments.device)?;
    let memory = replicas.budget(engine.offload, &mut devices);
    let first = devices.first().context("there is no device")?;
    let planner = MemoryPlanner {
        memory,
        ..planner(arguments, &files.config, first.device())?
    };
    // Each replica moves caches to a part of the host's memory. On a CPU that is what models and caches leave.
    let host = host_memory().map(|memory| engine.offload.part(memory));
    let left = match first.device().backend {
        "cpu" => None,
        _ => host.map(|memory| memory / replicas.count() as u64),
    };
    let options = DataParallelOptions {
        planner,
        engine: engine_options(arguments, arguments.caching.host_bytes(left)),
        drop: replicas.form(),
        automatic: true,
    };
    let loaded = data_parallel::load(files, devices, &options)?;
    tracing::info!(
        backend = loaded.device.backend,
        replicas = loaded.client.replicas(),
        context = loaded.sizes.context,
        sequences = loaded.sizes.sequences,
        blocks = loaded.sizes.blocks,
        "ready"
    );
    let model = ServedModel {
        files: loaded.files,
        engine: Arc::new(loaded.client),
        device: Some(loaded.device),
        context: loaded.sizes.context,
    };
    opener.open(model, None)?;
    Ok(())
}

/// Takes part in transfers of the engine's caches.
fn start(engine: &EngineHandle, config: KvTransfer) -> Result<Connector> {
    let runtime = tokio::runtime::Handle::current();
    let connector = runtime.block_on(Connector::start(engine, config))?;
    if let Some(port) = connector.port() {
        tracing::info!(port, "sending caches to decode servers");
    }
    Ok(connector)
}

/// Leaves experts to the CPU, if the flags say so. Where the length of the context is open, there is room for one of the usual length.
fn place(arguments: &Arguments, files: &LlmFiles, device: Box<dyn Backend>) -> Result<Placed> {
    let config = &files.config;
    let planner = planner(arguments, config, device.device())?;
    let context = planner.context.unwrap_or(CONTEXT);
    let planner = MemoryPlanner {
        context: Some(context.min(config.model_max_length)),
        ..planner
    };
    let checkpoint = || Ok(files.checkpoint()?);
    let offload = arguments.engine.offload;
    offload.place(device, config, checkpoint, |_| planner)
}

/// The planner of the engine's memory on this device, without weights and without a budget.
fn planner(arguments: &Arguments, config: &ModelConfig, device: &Device) -> Result<MemoryPlanner> {
    let engine = &arguments.engine;
    engine.check_dtype(config)?;
    Ok(MemoryPlanner {
        sequences: engine.max_num_seqs,
        context: engine.context(config)?,
        prefill_chunk: engine.prefill_chunk()?,
        checkpoints: arguments.caching.checkpoints(engine.max_num_seqs),
        blocks: engine.num_gpu_blocks_override,
        speculative: engine.speculative.tokens(),
        memory: None,
        weights: 0,
        degrees: engine.parallel.degrees(),
        cache: engine.cache.dtype(device),
    })
}
