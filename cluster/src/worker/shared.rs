//! What outlives the roles of a worker: its model, its transfers, its counts.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use dynamo_backend_common::{EngineConfig, LlmRegistration, SnapshotPublisher};
use kimi_linear::connector::{Connector, KvTransfer};
use kimi_linear::data_parallel::{PairOptions, ParameterDrop};
use kimi_linear::engine::{BLOCK_TOKENS, EngineSizes};
use kimi_linear::error::EngineError;
use tokio::sync::{OnceCell, watch};
use tokio::task::spawn_blocking;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::counts::Counts;
use super::events::BLOCK;
use super::metrics::{self, LastStatus, Load, Report};
use super::model::Model;
use super::options::{Options, can_be};
use crate::wire::{Registration, Role};

/// How long a shutdown waits for caches to be fetched that were offered.
const UNFETCHED: Duration = Duration::from_secs(5);

/// Interval at which it looks.
const PAUSE: Duration = Duration::from_millis(20);

/// A loaded model, and its transfers.
pub(super) struct Running {
    pub(super) model: Arc<Model>,
    pub(super) connector: Arc<Connector>,
}

/// A worker in whatever role.
pub struct Shared {
    options: Options,
    transfers: KvTransfer,
    running: OnceCell<Running>,
    counts: Arc<Counts>,
    last: Arc<LastStatus>,
    load: Load,
    /// The number of the role whose metrics are told.
    reporting: AtomicU64,
    /// Address of health, metrics and control.
    control: OnceLock<String>,
    orders: watch::Sender<Option<Role>>,
    /// Cancelled with the last owner.
    stop: CancellationToken,
    /// Cancelled when the engine has stopped.
    lost: CancellationToken,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Shared {
    /// A worker whose model is not loaded yet; `host` is this machine's address.
    ///
    /// # Errors
    /// Flags that cannot work, or a model that is not there.
    pub fn new(options: Options, host: IpAddr) -> Result<Arc<Self>> {
        options.check(host)?;
        Ok(Arc::new(Self {
            transfers: options.transfer.config(host)?,
            options,
            running: OnceCell::new(),
            counts: Arc::default(),
            last: Arc::default(),
            load: Load::default(),
            reporting: AtomicU64::new(0),
            control: OnceLock::new(),
            orders: watch::Sender::new(None),
            stop: CancellationToken::new(),
            lost: CancellationToken::new(),
        }))
    }

    pub(super) fn options(&self) -> &Options {
        &self.options
    }

    pub(super) fn counts(&self) -> &Arc<Counts> {
        &self.counts
    }

    /// Says where health, metrics and control are; the first address is kept.
    pub(super) fn controlled_at(&self, url: String) {
        let _ = self.control.set(url);
    }

    /// Roles that were ordered.
    pub(super) fn orders(&self) -> watch::Receiver<Option<Role>> {
        self.orders.subscribe()
    }

    /// Orders a role.
    ///
    /// # Errors
    /// A role that this worker cannot have.
    pub(super) fn order(&self, role: Role) -> Result<()> {
        self.check_role(role)?;
        self.orders.send_replace(Some(role));
        Ok(())
    }

    fn check_role(&self, role: Role) -> Result<()> {
        let (sends, fetches) = (self.transfers.listen.is_some(), self.transfers.fetch);
        can_be(role, sends, fetches)
    }

    /// The model, loaded first if it is not.
    ///
    /// # Errors
    /// A model that cannot be loaded, or an address that cannot be listened on.
    pub(super) async fn load(self: &Arc<Self>) -> Result<&Running> {
        self.running.get_or_try_init(|| self.open()).await
    }

    async fn open(self: &Arc<Self>) -> Result<Running> {
        let shared = Arc::clone(self);
        tracing::info!("loading {}", self.options.model.name());
        let model = spawn_blocking(move || Model::load(&shared.options, shared.pair()?)).await;
        let model = Arc::new(model.context("the model could not be loaded")??);
        let connector = Connector::start(&model.engine, self.transfers.clone()).await?;
        if let (Some(host), Some(port)) = (connector.host(), connector.port()) {
            tracing::info!(host, port, "sending caches to decode workers");
        }
        metrics::watch(
            Arc::clone(&model),
            Arc::clone(&self.last),
            Arc::clone(&self.counts),
            Arc::clone(&self.load),
            self.stop.clone(),
            self.lost.clone(),
        );
        let connector = Arc::new(connector);
        Ok(Running { model, connector })
    }

    /// What it drops under a burst, and with whom; `None` if it stays alone.
    fn pair(&self) -> Result<Option<(ParameterDrop, PairOptions)>> {
        let (flags, transfer) = (&self.options.parameters, &self.options.transfer);
        flags.pair(&self.transfers, transfer.has_secret())
    }

    /// Waits until the engine has stopped, which only an error makes it do.
    pub(super) async fn engine_lost(&self) {
        self.lost.cancelled().await;
    }

    /// The loaded model.
    ///
    /// # Errors
    /// A model that is still to be loaded.
    pub(super) fn running(&self) -> Result<&Running, EngineError> {
        self.running.get().ok_or(EngineError::Unavailable {
            reason: "the worker's model is not loaded yet".to_owned(),
        })
    }

    /// What a worker in this role registers.
    ///
    /// # Errors
    /// A role that this worker cannot have.
    pub(super) fn registration(&self, running: &Running, role: Role) -> Result<EngineConfig> {
        self.check_role(role)?;
        let (model, connector) = (&running.model, &running.connector);
        let (place, name) = (&self.options.place, self.options.model.name());
        let registration = Registration {
            cluster: place.cluster().to_owned(),
            role,
            control: self.control.get().cloned(),
            prefill_seconds_per_token: place.prefill_seconds_per_token,
            decode_seconds_per_token: place.decode_seconds_per_token,
        };
        let sizes = &model.sizes;
        let context = u32::try_from(model.context).map_err(|_| anyhow!("a context of 2^32"))?;
        Ok(EngineConfig {
            model: name.clone(),
            served_model_name: Some(name),
            model_aliases: Vec::new(),
            runtime_data: registration.runtime_data(),
            llm: Some(LlmRegistration {
                context_length: Some(context),
                kv_cache_block_size: Some(BLOCK),
                total_kv_blocks: Some(blocks(sizes) as u64),
                max_num_seqs: Some(sizes.sequences as u64),
                max_num_batched_tokens: Some((sizes.prefill_chunk + sizes.sequences) as u64),
                bootstrap_host: connector.host().map(str::to_owned),
                bootstrap_port: connector.port(),
                ..LlmRegistration::default()
            }),
        })
    }

    /// Where the router's load report goes from now on.
    pub(super) fn report_load_to(&self, publisher: Option<Arc<SnapshotPublisher>>) {
        *self.load.lock().unwrap_or_else(PoisonError::into_inner) = publisher;
    }

    /// The metrics of a role that begins: a function that gives their text, and nothing once a later role has begun, since Dynamo keeps
    /// those of earlier roles.
    pub(super) fn metrics_text(self: &Arc<Self>) -> impl Fn() -> Result<String> + use<> {
        let number = self.reporting.fetch_add(1, Ordering::Relaxed) + 1;
        let shared = Arc::downgrade(self);
        move || {
            let shared = shared.upgrade();
            let reports = shared.filter(|it| it.reporting.load(Ordering::Relaxed) == number);
            Ok(reports.map_or(String::new(), |shared| shared.report()))
        }
    }

    fn report(&self) -> String {
        let running = self.running.get();
        let transfers = running.map(|running| running.connector.stats());
        let (status, parameters) = self.last.get();
        let report = Report {
            model: &self.options.model.name(),
            status,
            parameters,
            totals: self.counts.totals(),
            seconds_per_token: self.options.place.prefill_seconds_per_token,
            transfers: transfers.unwrap_or_default(),
        };
        report.text()
    }

    /// Whether no request and no transfer is under way. Caches that are offered and not fetched yet are neither.
    pub(super) fn is_quiet(&self) -> bool {
        let roles = self.running.get().map(|running| running.connector.stats());
        let (roles, _) = roles.unwrap_or_default();
        let active: u64 = roles.iter().map(|(_, stats)| stats.active).sum();
        self.counts.totals().requests == 0 && active == 0
    }

    /// Finishes requests and transfers, for at most this long.
    pub(super) async fn finish(&self, limit: Duration) {
        let end = Instant::now() + limit;
        if !self.counts.none_left(limit).await {
            let left = self.counts.totals().requests;
            tracing::warn!("{left} requests are cut: they did not finish within {limit:?}");
        }
        let Some(running) = self.running.get() else {
            return;
        };
        let connector = &running.connector;
        // A decode worker may be about to fetch what was offered last.
        let fetched = end.min(Instant::now() + UNFETCHED);
        while connector.active() > 0 && Instant::now() < fetched {
            tokio::time::sleep(PAUSE).await;
        }
        if tokio::time::timeout_at(end, connector.shutdown())
            .await
            .is_err()
        {
            tracing::warn!("transfers are cut: they did not finish within {limit:?}");
        }
    }
}

/// Blocks of the latent cache.
fn blocks(sizes: &EngineSizes) -> usize {
    let all = || sizes.sequences * (sizes.context.div_ceil(BLOCK_TOKENS) + 1);
    sizes.blocks.unwrap_or_else(all)
}
