//! Connections: who is let in, how long they may be silent, and how it all ends.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream, ToSocketAddrs};
use tokio_io_timeout::TimeoutStream;

use super::gate::Gate;
use super::kv_transfer::KvTransfers;
use super::metrics::Metrics;
use super::options::ServerOptions;
use super::routes::{Shared, router};
use super::service::Service;
use crate::error::TokenizerError;
use crate::llm::Llm;

/// How often measurements are put in order, whether or not anybody reads them.
const UPKEEP: Duration = Duration::from_secs(5);

/// How long no connection is taken after one could not be: there are too many files open.
const PAUSE: Duration = Duration::from_millis(100);

/// How long connections may take to end once all answers are made: to read the last of them, or to send the rest of a request
/// that will not be answered.
const LINGER: Duration = Duration::from_secs(5);

/// A server that listens. Until it is given a model it says that it is loading.
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    shared: Arc<Shared>,
}

/// Gives a server its model, from wherever that is loaded.
#[derive(Clone)]
pub struct Opener(Arc<Shared>);

impl Opener {
    /// From now on the server answers with this model, and takes part in transfers of its caches where `transfers` is there. A second
    /// model is not taken.
    ///
    /// # Errors
    /// A vocabulary that grammars cannot be compiled for.
    pub fn open(&self, llm: Llm, transfers: Option<KvTransfers>) -> Result<(), TokenizerError> {
        let (options, metrics) = (Arc::clone(&self.0.options), Arc::clone(&self.0.metrics));
        let service = Service::new(llm, transfers, options, metrics)?;
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
        let name = options.model_names.first();
        let metrics = Metrics::new(name.map_or("kimi-linear", String::as_str));
        let address = listener.local_addr()?;
        Ok(Self {
            address,
            listener,
            shared: Arc::new(Shared {
                options: Arc::new(options),
                metrics: Arc::new(metrics),
                gate: Gate::new(),
                local: address.ip().is_loopback(),
                service: OnceLock::new(),
            }),
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
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
                match self.listener.accept().await {
                    Ok((stream, _)) => {
                        let service = TowerToHyperService::new(routes.clone());
                        serve(stream, service, &self.shared, &connections);
                    }
                    Err(error) => {
                        tracing::warn!("a connection could not be taken: {error}");
                        tokio::time::sleep(PAUSE).await;
                    }
                }
            }
        };
        let upkeep = async {
            loop {
                tokio::time::sleep(UPKEEP).await;
                self.shared.metrics.upkeep();
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
            if let Some(transfers) = service.and_then(|service| service.transfers()) {
                transfers.shutdown().await;
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

/// Serves one connection in a task of its own.
fn serve(
    stream: TcpStream,
    service: TowerToHyperService<axum::Router>,
    shared: &Arc<Shared>,
    connections: &GracefulShutdown,
) {
    let options = &shared.options;
    // Without it a token would wait for the one after it.
    let _ = stream.set_nodelay(true);
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(options.write_timeout));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(options.read_timeout)
        .serve_connection(TokioIo::new(Box::pin(stream)), service);
    let connection = connections.watch(connection);
    let gate = Arc::clone(&shared.gate);
    tokio::spawn(async move {
        tokio::select! {
            ended = connection => if let Err(error) = ended {
                tracing::debug!("a connection broke off: {error}");
            },
            () = gate.ending() => {}
        }
    });
}
