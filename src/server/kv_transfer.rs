//! Prompts that are read in one server and answered in another: this server's side, or both.
//!
//! A prefill server offers what its engine exports (`kv_export.rs`), a decode server fetches it and has its engine import it
//! (`kv_import.rs`). What travels and how is the library's business ([`crate::transfer`]).

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::engine::EngineHandle;
use crate::error::{Error, TransferError};
use crate::transfer::{Consumer, Identity, Producer, TransferOptions, TransferStats};

/// How often a shutdown looks whether transfers are under way.
const PAUSE: Duration = Duration::from_millis(20);

/// What a decode server does when caches do not come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoadFailure {
    /// It reads the prompt itself.
    #[default]
    Recompute,
    /// The request fails with the reason.
    Fail,
}

/// How a server takes part in transfers of caches.
#[derive(Clone, Debug)]
pub struct KvTransfer {
    /// The address to listen on for decode servers; `None` where prompts are not sent.
    pub listen: Option<(String, u16)>,
    /// Whether caches are fetched.
    pub fetch: bool,
    /// The host that decode servers are told to connect to; `None` for the one that is listened on.
    pub advertised_host: Option<String>,
    /// The producer of requests that name none.
    pub producer: Option<(String, u16)>,
    /// What is done when caches do not come.
    pub load_failure: LoadFailure,
    /// This server's name in answers; `None` for one that is drawn.
    pub engine_id: Option<String>,
    /// How transfers are done.
    pub options: TransferOptions,
}

/// A server's side of transfers, while it runs.
pub struct KvTransfers {
    pub(super) producer: Option<Producer>,
    pub(super) consumer: Option<Arc<Consumer>>,
    config: KvTransfer,
    engine_id: String,
    made: AtomicU64,
    recomputed: AtomicU64,
}

impl KvTransfers {
    /// Takes part in transfers of `engine`'s caches, as `config` says.
    ///
    /// # Errors
    /// An address that cannot be listened on or told to others, TLS without what its role needs, or an engine that has stopped.
    pub async fn start(engine: &EngineHandle, config: KvTransfer) -> Result<Self, Error> {
        let asked = engine.clone();
        let identity = tokio::task::spawn_blocking(move || identity(&asked)).await;
        let identity = identity.map_err(|_| TransferError::Closed)??;
        let producer = match &config.listen {
            None => None,
            Some((host, port)) => {
                let address = (host.as_str(), *port);
                let options = config.options.clone();
                Some(Producer::listen(address, identity.clone(), options).await?)
            }
        };
        let consumer = config
            .fetch
            .then(|| Arc::new(Consumer::new(identity, config.options.clone())));
        let drawn = || format!("{:016x}", rand::random::<u64>());
        Ok(Self {
            producer,
            consumer,
            engine_id: config.engine_id.clone().unwrap_or_else(drawn),
            config,
            made: AtomicU64::new(0),
            recomputed: AtomicU64::new(0),
        })
    }

    /// The port that decode servers connect to, where this one sends.
    #[must_use]
    pub fn port(&self) -> Option<u16> {
        self.producer
            .as_ref()
            .map(|producer| producer.local_addr().port())
    }

    /// A name for a transfer that brought none.
    pub(super) fn next_id(&self) -> String {
        let number = self.made.fetch_add(1, Ordering::Relaxed);
        format!("{}-{number}", self.engine_id)
    }

    /// What an answer says of where its caches are.
    pub(super) fn answer(&self, id: &str) -> serde_json::Value {
        let listened = || self.config.listen.as_ref().map(|(host, _)| host.clone());
        let host = self.config.advertised_host.clone().or_else(listened);
        let (host, port) = (host.unwrap_or_default(), self.port().unwrap_or_default());
        super::kv_params::answer(id, &host, port, &self.engine_id)
    }

    pub(super) fn load_failure(&self) -> LoadFailure {
        self.config.load_failure
    }

    /// The address of a request's producer, `host:port`.
    pub(super) fn address(&self, named: Option<&(String, u16)>) -> Option<String> {
        let (host, port) = named.or(self.config.producer.as_ref())?;
        Some(match host.parse() {
            Ok(IpAddr::V6(_)) => format!("[{host}]:{port}"),
            _ => format!("{host}:{port}"),
        })
    }

    pub(super) fn recomputed(&self) {
        self.recomputed.fetch_add(1, Ordering::Relaxed);
    }

    /// What each role has done, by vLLM's name of the role, and prompts that were read here because their caches did not come.
    pub(super) fn stats(&self) -> (Vec<(&'static str, TransferStats)>, u64) {
        let sent = self.producer.as_ref();
        let fetched = self.consumer.as_ref();
        let roles = sent
            .map(|producer| ("kv_producer", producer.stats()))
            .into_iter()
            .chain(fetched.map(|consumer| ("kv_consumer", consumer.stats())));
        (roles.collect(), self.recomputed.load(Ordering::Relaxed))
    }

    /// Finishes what is being sent; what was not asked for by now is told that this side ends.
    pub(super) async fn shutdown(&self) {
        if let Some(producer) = &self.producer {
            // Each ends by itself: with its last acknowledgement, or when its consumer stays away.
            while producer.stats().active > 0 {
                tokio::time::sleep(PAUSE).await;
            }
            producer.shutdown().await;
        }
    }
}

/// Whose caches an engine's are.
fn identity(engine: &EngineHandle) -> Result<Identity, Error> {
    let (model, layout) = (
        engine.cache_header(Vec::new())?.model,
        engine.cache_layout()?,
    );
    Ok(Identity::of(model, &layout, &engine.weight_formats()?))
}
