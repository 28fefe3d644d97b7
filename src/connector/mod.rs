//! Disaggregated prefill: one engine prefills a prompt, another decodes the answer. This is one engine's side, or both.
//!
//! A prefill instance offers what its engine exports (`export.rs`); a decode instance fetches it, and its engine imports it
//! (`import.rs`). The protocol is [`crate::transfer`].

mod config;
mod export;
mod import;

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::engine::EngineHandle;
use crate::error::{Error, TransferError};
use crate::transfer::{Consumer, Identity, Producer, TransferOptions, TransferStats};
pub use config::KvConfigError;
pub use import::Fetch;

/// Interval at which a shutdown checks for active transfers.
const PAUSE: Duration = Duration::from_millis(20);

/// The decode instance's policy if caches do not come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoadFailure {
    /// Prefill the prompt here.
    #[default]
    Recompute,
    /// Fail the request with the reason.
    Fail,
}

/// Configuration of an engine's cache transfers.
#[derive(Clone, Debug)]
pub struct KvTransfer {
    /// The address to listen on for decode instances; `None` if caches are not sent.
    pub listen: Option<(String, u16)>,
    /// Whether caches are fetched.
    pub fetch: bool,
    /// The host that decode instances connect to; `None` for that of the listening address.
    pub advertised_host: Option<String>,
    /// The producer of requests that name none.
    pub producer: Option<(String, u16)>,
    /// The policy if caches do not come.
    pub load_failure: LoadFailure,
    /// This instance's name in answers; `None` for a random one.
    pub engine_id: Option<String>,
    /// Options of transfers.
    pub options: TransferOptions,
}

/// The running transfers of an engine.
pub struct Connector {
    engine: EngineHandle,
    producer: Option<Producer>,
    consumer: Option<Arc<Consumer>>,
    config: KvTransfer,
    engine_id: String,
    made: AtomicU64,
    recomputed: Arc<AtomicU64>,
}

impl Connector {
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
            engine: engine.clone(),
            producer,
            consumer,
            engine_id: config.engine_id.clone().unwrap_or_else(drawn),
            config,
            made: AtomicU64::new(0),
            recomputed: Arc::default(),
        })
    }

    /// Whether caches are sent.
    #[must_use]
    pub fn sends(&self) -> bool {
        self.producer.is_some()
    }

    /// Whether caches are fetched.
    #[must_use]
    pub fn fetches(&self) -> bool {
        self.consumer.is_some()
    }

    /// The host that decode instances connect to, if caches are sent.
    #[must_use]
    pub fn host(&self) -> Option<&str> {
        let listened = self.config.listen.as_ref().map(|(host, _)| host.as_str());
        let advertised = self.config.advertised_host.as_deref();
        advertised.filter(|_| self.sends()).or(listened)
    }

    /// The port that decode instances connect to, if caches are sent.
    #[must_use]
    pub fn port(&self) -> Option<u16> {
        self.producer
            .as_ref()
            .map(|producer| producer.local_addr().port())
    }

    /// A name for a transfer without one.
    #[must_use]
    pub fn next_id(&self) -> String {
        let number = self.made.fetch_add(1, Ordering::Relaxed);
        format!("{}-{number}", self.engine_id)
    }

    /// This instance's name.
    #[must_use]
    pub fn engine_id(&self) -> &str {
        &self.engine_id
    }

    /// The address of a request's producer, `host:port`: the one that it names, or else that of the configuration.
    #[must_use]
    pub fn address(&self, named: Option<&(String, u16)>) -> Option<String> {
        let (host, port) = named.or(self.config.producer.as_ref())?;
        Some(match host.parse() {
            Ok(IpAddr::V6(_)) => format!("[{host}]:{port}"),
            _ => format!("{host}:{port}"),
        })
    }

    /// Counters of each role, by vLLM's name of the role, and of prompts that were prefilled here because their caches did
    /// not come.
    #[must_use]
    pub fn stats(&self) -> (Vec<(&'static str, TransferStats)>, u64) {
        let sent = self.producer.as_ref();
        let fetched = self.consumer.as_ref();
        let roles = sent
            .map(|producer| ("kv_producer", producer.stats()))
            .into_iter()
            .chain(fetched.map(|consumer| ("kv_consumer", consumer.stats())));
        (roles.collect(), self.recomputed.load(Ordering::Relaxed))
    }

    /// Number of transfers that are active or offered.
    #[must_use]
    pub fn active(&self) -> u64 {
        let (roles, _) = self.stats();
        let active = roles.iter().map(|(_, stats)| stats.active + stats.waiting);
        active.sum()
    }

    /// Finishes active transfers; offers that were not fetched are ended, and later requests for them refused.
    pub async fn shutdown(&self) {
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
