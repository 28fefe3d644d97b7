//! Disaggregated prefill: one server prefills a prompt, another decodes the answer. This is one server's side, or both.
//!
//! A prefill server offers what its engine exports (`kv_export.rs`); a decode server fetches it, and its engine imports it
//! (`kv_import.rs`). The protocol is in the library ([`crate::transfer`]).

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::engine::EngineHandle;
use crate::error::{Error, TransferError};
use crate::transfer::{Consumer, Identity, Producer, TransferOptions, TransferStats};

/// Interval at which a shutdown checks for active transfers.
const PAUSE: Duration = Duration::from_millis(20);

/// The decode server's policy if caches do not come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoadFailure {
    /// Prefill the prompt here.
    #[default]
    Recompute,
    /// Fail the request with the reason.
    Fail,
}

/// Configuration of a server's cache transfers.
#[derive(Clone, Debug)]
pub struct KvTransfer {
    /// The address to listen on for decode servers; `None` if caches are not sent.
    pub listen: Option<(String, u16)>,
    /// Whether caches are fetched.
    pub fetch: bool,
    /// The host that decode servers connect to; `None` for that of the listening address.
    pub advertised_host: Option<String>,
    /// The producer of requests that name none.
    pub producer: Option<(String, u16)>,
    /// The policy if caches do not come.
    pub load_failure: LoadFailure,
    /// This server's name in answers; `None` for a random one.
    pub engine_id: Option<String>,
    /// Options of transfers.
    pub options: TransferOptions,
}

/// A server's running transfers.
pub struct KvTransfers {
    pub(super) producer: Option<Producer>,
    pub(super) consumer: Option<Arc<Consumer>>,
    config: KvTransfer,
    engine_id: String,
    made: AtomicU64,
    recomputed: AtomicU64,
}

impl KvTransfers {
    /// Starts transfers of `engine`'s caches, as configured.
    ///
    /// # Errors
    /// An address that cannot be bound or announced, TLS without what its role needs, or an engine that has stopped.
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

    /// The port that decode servers connect to, if this server sends caches.
    #[must_use]
    pub fn port(&self) -> Option<u16> {
        self.producer
            .as_ref()
            .map(|producer| producer.local_addr().port())
    }

    /// A name for a transfer without one.
    pub(super) fn next_id(&self) -> String {
        let number = self.made.fetch_add(1, Ordering::Relaxed);
        format!("{}-{number}", self.engine_id)
    }

    /// The location of the caches, for an answer.
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

    /// Counters of each role, by vLLM's name of the role, and of prompts that were prefilled here because their caches did
    /// not come.
    pub(super) fn stats(&self) -> (Vec<(&'static str, TransferStats)>, u64) {
        let sent = self.producer.as_ref();
        let fetched = self.consumer.as_ref();
        let roles = sent
            .map(|producer| ("kv_producer", producer.stats()))
            .into_iter()
            .chain(fetched.map(|consumer| ("kv_consumer", consumer.stats())));
        (roles.collect(), self.recomputed.load(Ordering::Relaxed))
    }

    /// Finishes active transfers; offers that were not fetched are ended, and later requests for them refused.
    pub(super) async fn shutdown(&self) {
        if let Some(producer) = &self.producer {
            // Each ends by itself: with its last acknowledgement, or when its consumer does not return.
            while producer.stats().active > 0 {
                tokio::time::sleep(PAUSE).await;
            }
            producer.shutdown().await;
        }
    }
}

/// The identity of an engine's caches.
fn identity(engine: &EngineHandle) -> Result<Identity, Error> {
    let (model, layout) = (
        engine.cache_header(Vec::new())?.model,
        engine.cache_layout()?,
    );
    Ok(Identity::of(model, &layout, &engine.weight_formats()?))
}
