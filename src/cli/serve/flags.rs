//! The flags of `serve`, by what they are about. Those that vLLM has too have its names.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::builder::RangedU64ValueParser;
use clap::{Args, ValueEnum};
use kimi_linear::config::{Dtype, ModelConfig};
use kimi_linear::engine::{BLOCK_TOKENS, PREFILL_CHUNK};
use kimi_linear::server::{Origins, ServerOptions};

use super::super::options::{CacheOptions, DtypeName};
use super::vllm::token_count;

/// Where it listens and who may ask.
#[derive(Args)]
#[command(next_help_heading = "HTTP")]
pub(super) struct Http {
    /// The address to listen on; 0.0.0.0 is every one of this machine.
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1")]
    pub(super) host: String,
    /// The port to listen on; 0 is any that is free.
    #[arg(long, value_name = "PORT", default_value_t = 8000)]
    pub(super) port: u16,
    /// A key that clients must send; may be given several times. KIMI_LINEAR_API_KEY or VLLM_API_KEY holds one too, and is in no
    /// list of processes.
    #[arg(long, value_name = "KEY")]
    api_key: Vec<String>,
    /// The names that the model answers to; by default its folder's.
    #[arg(long, value_name = "NAME", num_args = 1..)]
    served_model_name: Vec<String>,
    /// A web page's origin whose scripts may ask and read answers; `*` is any. By default those of this machine. A list in JSON, as
    /// vLLM takes it, is read too.
    #[arg(long, value_name = "ORIGIN", num_args = 1..)]
    allowed_origins: Vec<String>,
    /// A name under which browsers may ask for this server (`Host`), beside this machine's own, where it listens on this machine
    /// alone and has no keys; `*` is any.
    #[arg(long, value_name = "NAME", num_args = 1..)]
    allowed_hosts: Vec<String>,
    /// The most bytes of a request.
    #[arg(long, value_name = "N", default_value_t = 8 << 20)]
    max_body_bytes: usize,
    /// Seconds that a client may take to send a request, or to read what was sent to it.
    #[arg(long, value_name = "S", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    client_timeout: u64,
    /// Seconds that a shutdown waits for answers that are under way; by default as long as they take.
    #[arg(long, value_name = "S")]
    shutdown_timeout: Option<u64>,
    /// Refuse every field that this server does not know, those too that change no answer.
    #[arg(long)]
    strict_fields: bool,
    /// Read control tokens that texts spell in /v1/completions and /tokenize, as vLLM does; a request's `parse_special` says
    /// otherwise.
    #[arg(long)]
    parse_special: bool,
}

impl Http {
    /// The keys. An empty one, as an unset variable leaves it on a command line, would open the server to all.
    fn keys(&self) -> Result<Vec<String>> {
        let mut keys: Vec<(&str, String)> = Vec::new();
        keys.extend(self.api_key.iter().map(|key| ("--api-key", key.clone())));
        for name in ["KIMI_LINEAR_API_KEY", "VLLM_API_KEY"] {
            keys.extend(std::env::var(name).ok().map(|key| (name, key)));
        }
        if let Some((name, _)) = keys.iter().find(|(_, key)| key.trim().is_empty()) {
            bail!(
                "{name} holds an empty key: give a key, or leave it out for a server without any"
            );
        }
        Ok(keys.into_iter().map(|(_, key)| key).collect())
    }

    fn origins(&self) -> Result<Origins> {
        let mut origins = Vec::new();
        for given in &self.allowed_origins {
            match given.trim_start().starts_with('[') {
                true => origins.extend(serde_json::from_str::<Vec<String>>(given).with_context(
                    || format!("--allowed-origins {given}: a list in JSON should hold texts"),
                )?),
                false => origins.push(given.clone()),
            }
        }
        Ok(match origins.as_slice() {
            [] => Origins::Local,
            these if these.iter().any(|origin| origin == "*") => Origins::Any,
            _ => Origins::These(origins),
        })
    }

    pub(super) fn options(&self, model: &str) -> Result<ServerOptions> {
        let mut hosts = self.allowed_hosts.clone();
        hosts.push(self.host.clone());
        let timeout = Duration::from_secs(self.client_timeout);
        let options = ServerOptions::new(model);
        Ok(ServerOptions {
            model_names: match self.served_model_name.is_empty() {
                true => options.model_names,
                false => self.served_model_name.clone(),
            },
            api_keys: self.keys()?,
            origins: self.origins()?,
            hosts,
            strict_fields: self.strict_fields,
            parse_special: self.parse_special,
            shutdown_timeout: self.shutdown_timeout.map(Duration::from_secs),
            body_bytes: self.max_body_bytes,
            read_timeout: timeout,
            write_timeout: timeout,
            ..options
        })
    }
}

/// How much runs at a time, and in what memory.
#[derive(Args)]
#[command(next_help_heading = "Engine")]
pub(super) struct Engines {
    /// Tokens that prompt and answer may have together, such as 4096, 4k (4000) or 4K (4096); by default what the model allows and
    /// memory holds.
    #[arg(long, value_name = "N", value_parser = token_count)]
    max_model_len: Option<usize>,
    /// Answers at a time.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = RangedU64ValueParser::<usize>::new().range(1..=4096))]
    pub(super) max_num_seqs: usize,
    /// Tokens of one step; by default 512 of prompts and one of each answer. Fewer let answers go on more evenly while a
    /// long prompt is read.
    #[arg(long, value_name = "N")]
    max_num_batched_tokens: Option<usize>,
    /// Requests that may wait beyond those that run; past them comes 429.
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub(super) max_queue: usize,
    /// The part of the device's memory that may be taken, the weights included.
    #[arg(long, value_name = "P", default_value_t = 0.9)]
    pub(super) gpu_memory_utilization: f64,
    /// Blocks of 64 tokens in the latent cache; by default enough for all, or as many as memory holds.
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub(super) num_gpu_blocks_override: Option<usize>,
    /// The dtype of the weights: they stay as they are in the checkpoint.
    #[arg(long, value_enum, default_value = "auto")]
    dtype: DtypeName,
    #[command(flatten)]
    pub(super) cache: CacheOptions,
    /// Seeds the requests that bring no seed; without it each differs.
    #[arg(long, value_name = "N")]
    pub(super) seed: Option<u64>,
    /// Devices that share the model: one, for now.
    #[arg(long, value_name = "N", default_value_t = 1)]
    tensor_parallel_size: usize,
}

impl Engines {
    /// What can be refused before anything is loaded.
    pub(super) fn check(&self) -> Result<()> {
        ensure!(
            self.tensor_parallel_size == 1,
            "--tensor-parallel-size {}: this program runs a model on one device; give 1, or leave it out",
            self.tensor_parallel_size
        );
        ensure!(
            self.gpu_memory_utilization > 0.0 && self.gpu_memory_utilization <= 1.0,
            "--gpu-memory-utilization should be above 0 and at most 1, but is {}",
            self.gpu_memory_utilization
        );
        self.prefill_chunk().map(|_| ())
    }

    /// The part of this memory that may be taken.
    pub(super) fn part(&self, bytes: u64) -> u64 {
        (bytes as f64 * self.gpu_memory_utilization) as u64
    }

    /// Weights are not converted.
    pub(super) fn check_dtype(&self, config: &ModelConfig) -> Result<()> {
        let stored = config.dtype.unwrap_or(Dtype::Bf16);
        match self.dtype.named().filter(|wanted| *wanted != stored) {
            None => Ok(()),
            Some(wanted) => anyhow::bail!(
                "--dtype {wanted}: the checkpoint's weights are {stored}, and nothing is converted; leave it at auto"
            ),
        }
    }

    pub(super) fn context(&self, config: &ModelConfig) -> Result<Option<usize>> {
        if let Some(length) = self.max_model_len {
            ensure!(
                length <= config.model_max_length,
                "--max-model-len {length}: the model was made for {} tokens",
                config.model_max_length
            );
        }
        Ok(self.max_model_len)
    }

    /// Tokens of prompts in one step.
    pub(super) fn prefill_chunk(&self) -> Result<usize> {
        let Some(tokens) = self.max_num_batched_tokens else {
            return Ok(PREFILL_CHUNK);
        };
        // Prompts are cut at blocks; one more, as a single token may stand alone after one.
        let least = self.max_num_seqs + BLOCK_TOKENS + 1;
        ensure!(
            tokens >= least,
            "--max-num-batched-tokens {tokens}: with --max-num-seqs {} at least {least} are needed, one for each answer and a block for prompts",
            self.max_num_seqs
        );
        Ok(tokens - self.max_num_seqs)
    }
}

/// What is kept of prompts.
#[derive(Args)]
#[command(next_help_heading = "Cache")]
pub(super) struct Caching {
    /// Go on from prefixes that were read before; this is the default.
    #[arg(long, overrides_with = "no_enable_prefix_caching")]
    enable_prefix_caching: bool,
    /// Read every prompt whole.
    #[arg(long, overrides_with = "enable_prefix_caching")]
    no_enable_prefix_caching: bool,
    /// State slots for prefixes, beside one for each answer; by default as many as answers, and at least 8.
    #[arg(long, value_name = "N")]
    prefix_checkpoints: Option<usize>,
    /// GiB of host memory for what has to leave the device.
    #[arg(long, value_name = "GIB", default_value_t = 4.0, value_parser = gibibytes)]
    swap_space: f64,
}

impl Caching {
    pub(super) fn prefix_caching(&self) -> bool {
        self.enable_prefix_caching || !self.no_enable_prefix_caching
    }

    pub(super) fn checkpoints(&self, sequences: usize) -> usize {
        let default = if self.prefix_caching() {
            sequences.max(8)
        } else {
            0
        };
        self.prefix_checkpoints.unwrap_or(default)
    }

    /// Bytes of host memory for what leaves the device, of those that are left.
    pub(super) fn host_bytes(&self, left: Option<u64>) -> u64 {
        let wanted = (self.swap_space * f64::from(1 << 30)) as u64;
        let bytes = left.map_or(wanted, |left| wanted.min(left));
        if bytes < wanted {
            tracing::warn!(
                "--swap-space {}: {} MiB are left beside the model, and no more are taken",
                self.swap_space,
                bytes >> 20
            );
        }
        bytes
    }
}

/// A number of GiB.
fn gibibytes(text: &str) -> Result<f64, String> {
    let number = text
        .parse()
        .ok()
        .filter(|number| (0.0..=1e9).contains(number));
    number.ok_or_else(|| "it should be a number of GiB, 0 or more".to_owned())
}

/// How the log is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// What is logged.
#[derive(Args)]
#[command(next_help_heading = "Log")]
pub(super) struct Logs {
    /// Log each request: its sizes, its parameters, how long it took; not what it says.
    #[arg(long)]
    pub(super) enable_log_requests: bool,
    /// Log what requests and answers say, too.
    #[arg(long)]
    pub(super) log_content: bool,
    /// How the log on stderr is written.
    #[arg(long, value_enum, default_value = "text")]
    pub(super) log_format: LogFormat,
}
