//! The flags of `serve` for prompts that are read in one server and answered in another.

use anyhow::Result;
use clap::Args;
use kimi_linear::server::KvTransfer;

/// The variable that holds the secret of both sides: a flag would be in every list of processes.
const SECRET: &str = "KIMI_LINEAR_KV_SECRET";

/// Transfers of caches.
#[derive(Args)]
#[command(next_help_heading = "Transfers of caches")]
pub(crate) struct KvFlags {
    /// Read prompts for other servers (listen:HOST:PORT), or have prompts read by the one that listens there
    /// (connect:HOST:PORT). KIMI_LINEAR_KV_SECRET holds the secret that both sides share.
    #[arg(
        long,
        value_name = "listen|connect:HOST:PORT",
        conflicts_with = "kv_transfer_config"
    )]
    kv_transfer: Option<String>,
    /// The same as JSON with vLLM's names: kv_role (kv_producer, kv_consumer, kv_both), kv_ip, kv_port,
    /// kv_load_failure_policy (recompute, fail), kv_connector_extra_config.
    #[arg(long, value_name = "JSON")]
    kv_transfer_config: Option<String>,
}

impl KvFlags {
    /// What was asked for; `None` for no transfers.
    pub(crate) fn config(&self) -> Result<Option<KvTransfer>> {
        let secret = std::env::var(SECRET).ok().filter(|it| !it.is_empty());
        let secret = secret.as_deref().map(str::as_bytes);
        Ok(match (&self.kv_transfer, &self.kv_transfer_config) {
            (Some(short), _) => Some(KvTransfer::from_short(short, secret)?),
            (None, Some(json)) => Some(KvTransfer::from_json(json, secret)?),
            (None, None) => None,
        })
    }
}
