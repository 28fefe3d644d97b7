//! Connections: who is let in, how long they may be silent, and how it all ends.

use std::net::SocketAddr;
#[cfg(unix)]
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, ToSocketAddrs};
use tokio_io_timeout::TimeoutStream;

use super::gate::Gate;
use super::metrics::Metrics;
use super::options::ServerOptions;
use super::routes::{Shared, router};
use super::service::Service;
#[cfg(unix)]
use super::socket::Socket;
use crate::backend::Device;
use crate::connector::Connector;
use crate::engine::EngineClient;
use crate::error::TokenizerError;
use crate::llm::{Llm, LlmFiles};

/// How often measurements are put in order, whether or not anybody reads them, and it is looked whether the server is idle.
const UPKEEP: Duration = Duration::from_secs(5);

/// How long no connection is taken after one could not be: there are too many files open.
const PAUSE: Duration = Duration::from_millis(100);

/// How long connections may take to end once all answers are made: to read the last of them, or to send the rest of a request
/// that will not be answered.
const LINGER: Duration = Duration::from_secs(5);

/// A server that listens. Until it is given a model it says that it is loading.
pub struct Server {
    listener: Listener,
    shared: Arc<Shared>,
}

/// What connections come from.
enum Listener {
    Tcp(TcpListener, SocketAddr),
    #[cfg(unix)]
    Unix(Socket),
}

/// A model that a server answers with.
pub struct ServedModel {
    /// Its configuration, tokenizer and chat template.
    pub files: LlmFiles,
    /// The engine that runs it, in this process or in others.
    pub engine: Arc<dyn EngineClient>,
    /// The device that it runs on, if that is one of this machine.
    pub device: Option<Device>,
    /// Maximum tokens of a prompt and its answer together.
    pub context: usize,
}

impl From<Llm> for ServedModel {
    fn from(llm: Llm) -> Self {
        let (context, device) = (llm.context(), llm.device().clone());
        let (files, engine) = llm.into_parts();
        Self {
            files,
            engine: Arc::new(engine),
            device: Some(device),
            context,
        }
    }
}

/// Gives a server its model, from wherever that is loaded.
#[derive(Clone)]
pub struct Opener(Arc<Shared>);

impl Opener {
    /// From now on the server answers with this model, and takes part in transfers of its caches where `connector` is there. A second
    /// model is not taken.
    ///
    /// # Errors
    /// A vocabulary that grammars cannot be compiled for.
    pub fn open(
        &self,
        model: ServedModel,
        connector: Option<Connector>,
    ) -> Result<(), TokenizerError> {
        let (options, metrics) = (Arc::clone(&self.0.options), Arc::clone(&self.0.metrics));
        let service = Service::new(model, connector, options, metrics)?;
        let _ = self.0.service.set(Arc::new(service));
        Ok(())
    }
}

impl Server {
    /// Listens on an address; port 0 is any that is free.
    ///
    /// # Errors
    /// An address that is not this machine's, or is taken.
    pub async fn bind(
        address: impl ToSocketAddrs,
        options: ServerOptions,
    ) -> std::io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let local = address.ip().is_loopback();
        Ok(Self::of(Listener::Tcp(listener, address), local, options))
    }

    /// Listens on a Unix socket. The socket of a server that has ended is replaced; the file is removed with the server.
    ///
    /// # Errors
    /// A path that cannot be written, that another server listens on, or that is not a socket.
    #[cfg(unix)]
    pub async fn bind_unix(path: &Path, options: ServerOptions) -> std::io::Result<Self> {
        let socket = Socket::bind(path).await?;
        // No web page reaches a Unix socket: requests may name any host.
        Ok(Self::of(Listener::Unix(socket), false, options))
    }

    fn of(listener: Listener, local: bool, options: ServerOptions) -> Self {
        let name = options.model_names.first();
        let metrics = Metrics::new(name.map_or("kimi-linear", String::as_str));
        Self {
            listener,
            shared: Arc::new(Shared {
                options: Arc::new(options),
                metrics: Arc::new(metrics),
                gate: Gate::new(),
                local,
                service: OnceLock::new(),
            }),
        }
    }

    /// The address that it listens on; `None` for a Unix socket.
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        match &self.listener {
            Listener::Tcp(_, address) => Some(*address),
            #[cfg(unix)]
            Listener::Unix(_) => None,
        }
    }

    /// Where it listens, as clients write it: `http://HOST:PORT`, `https://HOST:PORT`, or `unix:PATH`.
    #[must_use]
    pub fn url(&self) -> String {
        match &self.listener {
            Listener::Tcp(_, address) => {
                let scheme = match self.shared.options.tls {
                    Some(_) => "https",
                    None => "http",
                };
                format!("{scheme}://{address}")
            }
            #[cfg(unix)]
            Listener::Unix(socket) => format!("unix:{}", socket.path().display()),
        }
    }

    /// What gives it its model.
    #[must_use]
    pub fn opener(&self) -> Opener {
        Opener(Arc::clone(&self.shared))
    }

    /// Serves until `shutdown` is complete. Then it refuses what comes, finishes what it has begun, and returns.
    pub async fn run(self, shutdown: impl Future<Output = ()>) {
        let connections = GracefulShutdown::new();
        let accept = async {
            let routes = router(Arc::clone(&self.shared));
            loop {
                let service = TowerToHyperService::new(routes.clone());
                let connection = Connection {
                    service,
                    shared: Arc::clone(&self.shared),
                    watcher: connections.watcher(),
                };
                match self.listener.accept(connection).await {
                    Ok(()) => self.shared.gate.see(),
                    Err(error) => {
                        tracing::warn!("a connection could not be taken: {error}");
                        tokio::time::sleep(PAUSE).await;
                    }
                }
            }
        };
        let upkeep = async {
            let (gate, mut seen) = (&self.shared.gate, 0);
            loop {
                tokio::time::sleep(UPKEEP).await;
                self.shared.metrics.upkeep();
                let idle = gate.count() == 0 && seen != gate.seen();
                if let Some(on_idle) = self.shared.options.on_idle.filter(|_| idle) {
                    seen = gate.seen();
                    on_idle();
                }
            }
        };
        let end = async {
            shutdown.await;
            self.shared.gate.close();
            tracing::info!("shutting down: finishing the answers that are under way");
            let empty = self.shared.gate.empty();
            let most = self.shared.options.shutdown_timeout;
            if tokio::time::timeout(most.unwrap_or(Duration::MAX), empty)
                .await
                .is_err()
            {
                tracing::warn!("the time to finish is over: what is still under way is cut");
            }
            let service = self.shared.service.get();
            if let Some(connector) = service.and_then(|service| service.connector()) {
                connector.shutdown().await;
            }
        };
        tokio::select! {
            () = accept => {}
            () = upkeep => {}
            () = end => {}
        }
        drop(self.listener);
        // Those that still send an answer's end finish; those that are idle are closed.
        if tokio::time::timeout(LINGER, connections.shutdown())
            .await
            .is_err()
        {
            self.shared.gate.end();
        }
    }
}

impl Listener {
    /// Waits for a connection, and serves it in a task of its own.
    async fn accept(&self, connection: Connection) -> std::io::Result<()> {
        match self {
            Self::Tcp(listener, _) => {
                let (stream, _) = listener.accept().await?;
                // Without it a token would wait for the one after it.
                let _ = stream.set_nodelay(true);
                tokio::spawn(connection.serve(stream));
            }
            #[cfg(unix)]
            Self::Unix(socket) => _ = tokio::spawn(connection.serve(socket.accept().await?)),
        }
        Ok(())
    }
}

/// What one connection is served with.
struct Connection {
    service: TowerToHyperService<axum::Router>,
    shared: Arc<Shared>,
    watcher: Watcher,
}

impl Connection {
    async fn serve(self, stream: impl AsyncRead + AsyncWrite + Send + 'static) {
        let shared = Arc::clone(&self.shared);
        let options = &shared.options;
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(options.write_timeout));
        let stream = Box::pin(stream);
        let Some(tls) = &options.tls else {
            return self.serve_http(stream).await;
        };
        let handshake = tls.acceptor().accept(stream);
        tokio::select! {
            done = tokio::time::timeout(options.read_timeout, handshake) => match done {
                Ok(Ok(stream)) => self.serve_http(stream).await,
                Ok(Err(error)) => tracing::debug!("a TLS handshake failed: {error}"),
                Err(_) => tracing::debug!("a TLS handshake did not complete in time"),
            },
            () = shared.gate.closing() => {}
        }
    }

    async fn serve_http(self, stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) {
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.shared.options.read_timeout)
            .serve_connection(TokioIo::new(stream), self.service);
        let connection = self.watcher.watch(connection);
        tokio::select! {
            ended = connection => if let Err(error) = ended {
                tracing::debug!("a connection broke off: {error}");
            },
            () = self.shared.gate.ending() => {}
        }
    }
}
