//! The flags of `serve` for disaggregated prefill: one server prefills a prompt, another decodes the answer.

use anyhow::Result;
use clap::Args;
use kimi_linear::connector::KvTransfer;

/// The variable that holds the secret of both sides: a flag would be in every list of processes.
const SECRET: &str = "KIMI_LINEAR_KV_SECRET";

/// KV cache transfer.
#[derive(Args)]
#[command(next_help_heading = "KV cache transfer")]
pub(crate) struct KvFlags {
    /// Disaggregated prefill: with listen:HOST:PORT this server prefills prompts for decode servers, with connect:HOST:PORT its prompts
    /// may be prefilled by the server at that address. KIMI_LINEAR_KV_SECRET sets the secret that both servers share.
    #[arg(
        long,
        value_name = "listen|connect:HOST:PORT",
        conflicts_with = "kv_transfer_config"
    )]
    kv_transfer: Option<String>,
    /// The same as JSON, with vLLM's keys: kv_role (kv_producer, kv_consumer, kv_both), kv_ip, kv_port,
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
