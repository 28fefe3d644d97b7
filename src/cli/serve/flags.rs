//! The flags of `serve`, grouped by topic, with vLLM's names where vLLM has the flag.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::builder::RangedU64ValueParser;
use clap::{Args, ValueEnum};
use kimi_linear::config::{Dtype, ModelConfig};
use kimi_linear::engine::{BLOCK_TOKENS, PREFILL_CHUNK};
use kimi_linear::server::{Origins, ServerOptions};

use super::super::data_parallel::ReplicaOptions;
use super::super::nodes::NodeOptions;
use super::super::offload::OffloadOptions;
use super::super::options::{CacheOptions, DtypeName, parse_tokens};
use super::super::parallel::ParallelOptions;
use super::super::speculative::SpeculativeOptions;
use super::tls::Ssl;

/// The address to listen on, and who may send requests.
#[derive(Args)]
#[command(next_help_heading = "HTTP")]
pub(super) struct Http {
    /// Address to listen on; 0.0.0.0 is all interfaces.
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1")]
    pub(super) host: String,
    /// Port to listen on; 0 picks a free port, which is printed. The server listens before the model is loaded, and answers requests for
    /// it with 503 until then; /health says when it is ready.
    #[arg(long, value_name = "PORT", default_value_t = 8000)]
    pub(super) port: u16,
    /// Unix socket to listen on, in place of --host and --port.
    #[arg(long, value_name = "PATH")]
    pub(super) uds: Option<PathBuf>,
    /// Path prefix under which a proxy shows the server, such as /llm. Paths are answered with and without it.
    #[arg(long, value_name = "PATH")]
    root_path: Option<String>,
    /// API key that clients must send as a bearer token. Can be repeated. A key in KIMI_LINEAR_API_KEY or VLLM_API_KEY is accepted
    /// too, and does not show in the process list. Default: no key is needed.
    #[arg(long, value_name = "KEY")]
    api_key: Vec<String>,
    /// Model names that requests may use, separated by spaces: every word up to the next option is a name, so MODEL comes before this
    /// option. Default: the name of the model's folder or file.
    #[arg(long, value_name = "NAME", num_args = 1..)]
    served_model_name: Vec<String>,
    /// Origins whose web pages may call this server (CORS), or a JSON list of them; `*` allows all. Default: localhost on any port.
    #[arg(long, value_name = "ORIGIN", num_args = 1..)]
    allowed_origins: Vec<String>,
    /// Additional values of the Host header that are accepted. The header is checked only if the server has no API key and listens on
    /// the loopback interface; by default it must then name this machine. `*` accepts all.
    #[arg(long, value_name = "NAME", num_args = 1..)]
    allowed_hosts: Vec<String>,
    /// Maximum size of a request body in bytes.
    #[arg(long, value_name = "BYTES", default_value_t = 8 << 20)]
    max_body_bytes: usize,
    /// Seconds after which a connection is closed whose client does not complete a request, or does not read the response.
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    client_timeout: u64,
    /// Seconds that a shutdown waits for running requests. Default: until they have finished.
    #[arg(long, value_name = "SECONDS")]
    shutdown_timeout: Option<u64>,
    /// Reject every unknown field of a request, including those known to have no effect on the answer.
    #[arg(long)]
    strict_fields: bool,
    /// Parse names of control tokens in the text of /v1/completions and /tokenize as control tokens, as vLLM does. A request's field
    /// `parse_special` overrides it.
    #[arg(long)]
    parse_special: bool,
    // Options with a help heading come last: clap puts what follows them under the same heading.
    #[command(flatten)]
    ssl: Ssl,
}

impl Http {
    /// The API keys. An empty key is rejected: an unset shell variable leaves one, and it would give everybody access.
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

    /// The path prefix, with a slash before it and none behind.
    fn root_path(&self) -> Result<String> {
        let given = self.root_path.as_deref().unwrap_or_default();
        let path = given.trim_matches('/');
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "/-._~".contains(c);
        ensure!(
            path.chars().all(is_plain) && !path.contains("//"),
            "--root-path {given}: a path such as /llm is expected, of letters, digits and -._~"
        );
        Ok(match path {
            "" => String::new(),
            path => format!("/{path}"),
        })
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

    /// Refuses a model among the values of the options that take all words up to the next option.
    pub(super) fn check_lists(&self) -> Result<()> {
        let lists = [
            ("--served-model-name", &self.served_model_name),
            ("--allowed-origins", &self.allowed_origins),
            ("--allowed-hosts", &self.allowed_hosts),
        ];
        for (name, values) in lists {
            if let Some(path) = values.iter().find(|value| Path::new(value).exists()) {
                bail!(
                    "{name} takes every word up to the next option, and {path} is a file or folder: put the model first, as in `serve \
                     {path} {name} ..`, or use --model {path}"
                );
            }
        }
        Ok(())
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
            tls: self.ssl.tls()?,
            root_path: self.root_path()?,
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

/// A length of the context; `None` for as much as the model and the memory allow.
#[derive(Clone, Copy)]
struct Length(Option<usize>);

fn parse_length(text: &str) -> Result<Length, String> {
    match text.trim() {
        "auto" | "-1" => Ok(Length(None)),
        number => parse_tokens(number).map(|length| Length(Some(length))),
    }
}

/// The order of requests.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum SchedulingPolicy {
    /// First come, first served.
    Fcfs,
    /// By the field `priority` of requests.
    Priority,
}

/// Batch sizes and memory.
#[derive(Args)]
#[command(next_help_heading = "Engine")]
pub(super) struct Engines {
    /// Maximum tokens of prompt and answer together, such as 8192, 128K (131,072) or 128k (128,000). Default, as with `auto` and -1: the
    /// model's maximum, or what fits in memory if that is less.
    #[arg(long, value_name = "N", value_parser = parse_length, allow_hyphen_values = true)]
    max_model_len: Option<Length>,
    /// Maximum number of sequences that run at the same time.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = RangedU64ValueParser::<usize>::new().range(1..=4096))]
    pub(super) max_num_seqs: usize,
    /// Maximum tokens per engine step. Default: 512 prompt tokens plus one for each of --max-num-seqs. A smaller value shortens the
    /// pauses of running answers while a long prompt is prefilled.
    #[arg(long, value_name = "N", value_parser = parse_tokens)]
    max_num_batched_tokens: Option<usize>,
    /// Order of requests: of arrival (`fcfs`), or by their field `priority`, lower values first, then of arrival (`priority`).
    #[arg(long, value_name = "POLICY", value_enum, default_value = "fcfs")]
    pub(super) scheduling_policy: SchedulingPolicy,
    /// Wait for the tokens of a step before the next one is submitted. By default a GPU computes the next step meanwhile, if no
    /// draw depends on them; answers are the same.
    #[arg(long)]
    pub(super) no_async_scheduling: bool,
    #[command(flatten)]
    pub(super) speculative: SpeculativeOptions,
    /// Maximum number of waiting requests; further ones are refused with HTTP 429.
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub(super) max_queue: usize,
    #[command(flatten)]
    pub(super) offload: OffloadOptions,
    /// Number of 64-token blocks in the latent cache. Default: enough for --max-num-seqs sequences of --max-model-len tokens, or as
    /// many as fit in memory.
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub(super) num_gpu_blocks_override: Option<usize>,
    /// Data type of the weights. They are not converted: only `auto` and the checkpoint's own dtype are accepted.
    #[arg(long, value_enum, default_value = "auto")]
    dtype: DtypeName,
    #[command(flatten)]
    pub(super) cache: CacheOptions,
    /// Seed for requests that do not set one. Default: a new seed for each request.
    #[arg(long, value_name = "N")]
    pub(super) seed: Option<u64>,
    #[command(flatten)]
    pub(super) parallel: ParallelOptions,
    #[command(flatten)]
    pub(super) nodes: NodeOptions,
    #[command(flatten)]
    pub(super) replicas: ReplicaOptions,
}

impl Engines {
    /// Refuses invalid values before anything is loaded. `transfers` says whether caches come from other servers, or go to them.
    pub(super) fn check(&self, config: &ModelConfig, transfers: bool) -> Result<()> {
        let several = self.nodes.are_several() || self.nodes.is_headless();
        let degrees = self.parallel.degrees();
        self.offload.check(config, degrees, several)?;
        let divided = [
            (degrees.tensor > 1, "--tensor-parallel-size"),
            (degrees.expert > 1, "expert parallelism"),
            (degrees.pipeline > 1, "--pipeline-parallel-size"),
            (several, "--nnodes"),
            (self.offload.layers().is_some(), "--n-cpu-moe"),
            (transfers, "--kv-transfer"),
        ];
        let divided = divided.into_iter().filter(|(given, _)| *given);
        let divided: Vec<_> = divided.map(|(_, flag)| flag).collect();
        self.replicas.check(config, &divided)?;
        self.prefill_chunk().map(|_| ())
    }

    /// Weights are not converted.
    pub(super) fn check_dtype(&self, config: &ModelConfig) -> Result<()> {
        let stored = config.dtype.unwrap_or(Dtype::Bf16);
        match self.dtype.named().filter(|wanted| *wanted != stored) {
            None => Ok(()),
            Some(wanted) => anyhow::bail!(
                "--dtype {wanted}: the checkpoint's weights are {stored}, and weights are not converted; use --dtype auto"
            ),
        }
    }

    pub(super) fn context(&self, config: &ModelConfig) -> Result<Option<usize>> {
        let length = self.max_model_len.and_then(|Length(length)| length);
        if let Some(length) = length {
            ensure!(
                length >= 2,
                "--max-model-len {length}: at least 2 are needed, one prompt token and one generated token"
            );
            ensure!(
                length <= config.model_max_length,
                "--max-model-len {length}: the model was made for {} tokens",
                config.model_max_length
            );
        }
        Ok(length)
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

/// The prefix cache.
#[derive(Args)]
#[command(next_help_heading = "Cache")]
pub(super) struct Caching {
    /// Reuse the caches of prompt prefixes that were computed before (the default).
    #[arg(long, overrides_with = "no_enable_prefix_caching")]
    enable_prefix_caching: bool,
    /// Compute every prompt from its first token.
    #[arg(long, overrides_with = "enable_prefix_caching")]
    no_enable_prefix_caching: bool,
    /// Number of KDA states kept on the device for cached prefixes, in addition to one for each running sequence. Default:
    /// --max-num-seqs, at least 8; 0 without prefix caching.
    #[arg(long, value_name = "N")]
    prefix_checkpoints: Option<usize>,
    /// GiB of host memory for the caches (KDA states and MLA latents) of preempted requests and of cached prefixes.
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

    /// Bytes of host memory for states and latents that are moved off the device, at most those that are `left`.
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
    /// Plain text lines.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// What is logged.
#[derive(Args)]
#[command(next_help_heading = "Log")]
pub(super) struct Logs {
    /// Log size, parameters and duration of each request, without its content.
    #[arg(long)]
    pub(super) enable_log_requests: bool,
    /// Log each request with its prompt and answer.
    #[arg(long)]
    pub(super) log_content: bool,
    /// Format of the log on stderr.
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "text")]
    pub(super) log_format: LogFormat,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        engine: Engines,
    }

    fn engine(arguments: &[&str]) -> Engines {
        Cli::parse_from([&["serve"], arguments].concat()).engine
    }

    #[test]
    fn token_counts_may_have_a_unit() {
        let config = ModelConfig::published().unwrap();
        let long = engine(&["--max-model-len", "128K", "--max-num-batched-tokens", "4K"]);
        assert_eq!(long.context(&config).unwrap(), Some(128 << 10));
        assert_eq!(long.prefill_chunk().unwrap(), 4096 - 32);
        let decimal = engine(&["--max-model-len", "4k"]);
        assert_eq!(decimal.context(&config).unwrap(), Some(4000));
        for auto in ["auto", "-1"] {
            let auto = engine(&["--max-model-len", auto]);
            assert_eq!(auto.context(&config).unwrap(), None);
        }
        let short = engine(&["--max-model-len", "1"]).context(&config);
        assert!(short.unwrap_err().to_string().contains("at least 2"));
    }

    #[test]
    fn replicas_go_with_no_other_division() {
        let config = ModelConfig::published().unwrap();
        let said = |flags: &[&str], transfers| {
            let checked = engine(flags).check(&config, transfers).err();
            checked.map(|error| error.to_string()).unwrap_or_default()
        };
        let two = ["--data-parallel-size", "2"];
        let with = |more: &[&'static str]| [&two[..], more].concat();
        assert_eq!(said(&with(&["--parameter-drop", "experts"]), false), "");
        assert_eq!(said(&["--dp", "1", "--tp", "2"], true), "");
        for (flags, named) in [
            (with(&["--tp", "2"]), "--tensor-parallel-size"),
            (with(&["--ep-size", "2"]), "expert parallelism"),
            (with(&["--pp", "2"]), "--pipeline-parallel-size"),
            (with(&["--nnodes", "2"]), "--nnodes"),
            (with(&["--n-cpu-moe", "auto"]), "--n-cpu-moe"),
        ] {
            let text = said(&flags, false);
            assert!(
                text.contains("does not go with") && text.contains(named),
                "{text}"
            );
        }
        let text = said(&two, true);
        assert!(
            text.ends_with("it does not go with --kv-transfer"),
            "{text}"
        );
        let text = said(&["--parameter-drop", "layers"], false);
        assert!(text.contains("--data-parallel-size 2 or more"), "{text}");
    }
}
