//! The flags of `kimi-linear-worker`, with the names that `kimi-linear serve` has for the same.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::builder::RangedU64ValueParser;
use clap::{Args, Parser, ValueEnum};
use kimi_linear::backend::BackendKind;
use kimi_linear::checkpoint::Preset;
use kimi_linear::config::{Dtype, ModelConfig};
use kimi_linear::connector::KvTransfer;
use kimi_linear::engine::{BLOCK_TOKENS, PREFILL_CHUNK};

use super::parameters::ParameterFlags;
use crate::settings::NetworkFlags;
use crate::wire::{self, Role};

/// The variable that holds the secret of workers that transfer caches: a flag would be in every list of processes.
const SECRET: &str = "KIMI_LINEAR_KV_SECRET";

/// The name of the demo model.
const DEMO: &str = "kimi-linear-demo";

/// All flags of a worker.
#[derive(Parser, Clone, Debug)]
#[command(
    name = "kimi-linear-worker",
    version,
    about = "A worker that runs Kimi Linear behind an NVIDIA Dynamo frontend",
    after_help = AFTER_HELP
)]
pub struct Options {
    #[command(flatten)]
    pub(super) model: ModelFlags,
    #[command(flatten)]
    pub(super) place: PlaceFlags,
    #[command(flatten)]
    pub(super) engine: EngineFlags,
    #[command(flatten)]
    pub(super) transfer: TransferFlags,
    #[command(flatten)]
    pub(super) parameters: ParameterFlags,
    #[command(flatten)]
    pub(super) network: NetworkFlags,
}

const AFTER_HELP: &str = "\
Example, on one machine:
  kimi-linear-worker --role prefill &
  kimi-linear-worker --role decode &
  kimi-linear-frontend --port 8000

POST /engine/update/role {\"role\": \"decode\"} to the worker's system port changes its role while it runs. Ctrl-C or SIGTERM leaves \
discovery, finishes running answers and transfers, and exits; a second signal exits at once. Variables of Dynamo that have no flag here \
(DYN_LOG, DYN_TCP_TLS_*, ETCD_*) are read by Dynamo.";

/// The model.
#[derive(Args, Clone, Debug)]
pub(super) struct ModelFlags {
    /// Model: a folder with config.json, tokenizer files and safetensors weights, or a GGUF. All workers and the frontend need the same
    /// one. Default: the built-in demo model.
    #[arg(short, long, value_name = "DIR|FILE")]
    pub(super) model: Option<PathBuf>,
    /// Name that requests use for the model. Default: the name of its folder, or of its file without the extension.
    #[arg(long, value_name = "NAME")]
    served_model_name: Option<String>,
    /// Quantise a model in BF16, F16 or F32 while it is loaded: q8, q5, q4, q4-fast or q4-small.
    #[arg(long, value_name = "PRESET")]
    pub(super) quantize: Option<Preset>,
    /// Backend to run on.
    #[arg(long, value_enum, ignore_case = true, default_value = "auto")]
    backend: BackendName,
    /// Device number, as `kimi-linear devices` lists it. Default: the backend's best device.
    #[arg(long, value_name = "N")]
    pub(super) device: Option<usize>,
}

impl ModelFlags {
    /// The model's folder or file.
    pub(super) fn path(&self) -> Result<PathBuf> {
        match &self.model {
            Some(path) => Ok(path.clone()),
            None => Ok(kimi_linear::demo::folder()?),
        }
    }

    /// The name that requests use.
    pub(super) fn name(&self) -> String {
        if let Some(name) = &self.served_model_name {
            return name.clone();
        }
        let Some(path) = &self.model else {
            return DEMO.to_owned();
        };
        let name = match path.is_file() {
            true => path.file_stem().map(ToOwned::to_owned),
            false => {
                let path = path.canonicalize().ok();
                path.and_then(|path| path.file_name().map(ToOwned::to_owned))
            }
        };
        name.map_or("kimi-linear".to_owned(), |name| {
            name.to_string_lossy().into_owned()
        })
    }

    pub(super) fn backend(&self) -> BackendKind {
        match self.backend {
            BackendName::Auto => BackendKind::Auto,
            BackendName::Cpu => BackendKind::Cpu,
            BackendName::Wgpu => BackendKind::Wgpu,
            BackendName::Cuda => BackendKind::Cuda,
        }
    }
}

/// A backend's name.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum BackendName {
    /// A GPU if there is one, otherwise the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// Any GPU, through Vulkan, Metal or DX12.
    Wgpu,
    /// An NVIDIA GPU, through CUDA.
    Cuda,
}

/// A worker's place in the cluster.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Cluster")]
pub(super) struct PlaceFlags {
    /// What the worker does: prefill prompts for decode workers, decode, both for its own requests, or prefill in the cluster `prfaas`,
    /// for a cluster elsewhere.
    #[arg(long, value_enum, value_name = "ROLE", default_value = "both")]
    role: RoleName,
    /// Name of the cluster that it belongs to. Links between clusters are taken for slow. Default: `prfaas` for that role, `local` for
    /// the others.
    #[arg(long, value_name = "NAME")]
    cluster: Option<String>,
    /// Protocols that Dynamo's own frontends offer for the model: chat, completions, or both with a comma between. With completions
    /// they load the tokenizer from the model's folder.
    #[arg(
        long,
        value_name = "TYPES",
        env = "DYN_ENDPOINT_TYPES",
        default_value = "chat"
    )]
    pub(super) endpoint_types: String,
    /// Seconds that this worker needs to prefill a token, for the scheduler and for /metrics.
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub(super) prefill_seconds_per_token: Option<f64>,
    /// Seconds that it needs to decode a token of a sequence.
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub(super) decode_seconds_per_token: Option<f64>,
    /// Seconds that a shutdown waits for running answers and transfers after the worker has left discovery.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    shutdown_timeout: u64,
}

/// A role on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum RoleName {
    /// Prefill prompts for decode workers.
    Prefill,
    /// Decode answers whose prompts prefill workers compute.
    Decode,
    /// Prefill and decode.
    Both,
    /// Prefill in the cluster `prfaas`.
    Prfaas,
}

impl PlaceFlags {
    /// The role at the start.
    pub(super) fn role(&self) -> Role {
        match self.role {
            RoleName::Prefill | RoleName::Prfaas => Role::Prefill,
            RoleName::Decode => Role::Decode,
            RoleName::Both => Role::Both,
        }
    }

    pub(super) fn cluster(&self) -> &str {
        match (&self.cluster, self.role) {
            (Some(name), _) => name,
            (None, RoleName::Prfaas) => wire::PRFAAS,
            (None, _) => wire::LOCAL,
        }
    }

    pub(super) fn shutdown_timeout(&self) -> Duration {
        Duration::from_secs(self.shutdown_timeout)
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok();
    let number = number.filter(|number| *number > 0.0 && number.is_finite());
    number.ok_or_else(|| "it should be a number of seconds above 0".to_owned())
}

/// The data type of the latent cache.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum CacheName {
    /// The device's own.
    Auto,
    /// IEEE single precision.
    #[value(alias = "float32")]
    F32,
    /// IEEE half precision.
    #[value(alias = "float16")]
    F16,
    /// bfloat16.
    #[value(alias = "bfloat16")]
    Bf16,
}

/// Batch sizes, memory and the prefix cache.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Engine")]
pub(super) struct EngineFlags {
    /// Maximum tokens of prompt and answer together, such as 8192, 128K (131,072) or 128k (128,000). Default: the model's maximum, or
    /// what fits in memory if that is less.
    #[arg(long, value_name = "N", value_parser = tokens)]
    max_model_len: Option<usize>,
    /// Maximum number of sequences that run at the same time.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = RangedU64ValueParser::<usize>::new().range(1..=4096))]
    pub(super) max_num_seqs: usize,
    /// Maximum tokens per engine step. Default: 512 prompt tokens plus one for each of --max-num-seqs.
    #[arg(long, value_name = "N", value_parser = tokens)]
    max_num_batched_tokens: Option<usize>,
    /// Maximum number of waiting requests; further ones go to another worker, or are refused.
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub(super) max_queue: usize,
    /// Fraction of the device's memory to use for weights, caches and activations.
    #[arg(long, value_name = "FRACTION", default_value_t = 0.9)]
    gpu_memory_utilization: f64,
    /// Number of 64-token blocks in the latent cache. Default: enough for --max-num-seqs sequences of --max-model-len tokens, or as
    /// many as fit in memory.
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub(super) num_gpu_blocks_override: Option<usize>,
    /// Data type of the MLA latent cache. Workers that transfer caches to each other need the same one.
    #[arg(long, value_enum, value_name = "DTYPE", default_value = "auto")]
    kv_cache_dtype: CacheName,
    /// Number of KDA states kept on the device for cached prefixes, in addition to one for each running sequence. Default:
    /// --max-num-seqs, at least 8.
    #[arg(long, value_name = "N")]
    prefix_checkpoints: Option<usize>,
    /// GiB of host memory for the caches of preempted requests and of cached prefixes.
    #[arg(long, value_name = "GIB", default_value_t = 4.0)]
    swap_space: f64,
}

impl EngineFlags {
    pub(super) fn context(&self, config: &ModelConfig) -> Result<Option<usize>> {
        if let Some(length) = self.max_model_len {
            ensure!(
                (2..=config.model_max_length).contains(&length),
                "--max-model-len {length}: from 2 (a prompt token and a generated one) to {} tokens, for which the model was made",
                config.model_max_length
            );
        }
        Ok(self.max_model_len)
    }

    /// Prompt tokens in one step.
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

    /// The part of these bytes that may be used.
    pub(super) fn part(&self, bytes: u64) -> u64 {
        (bytes as f64 * self.gpu_memory_utilization) as u64
    }

    pub(super) fn checkpoints(&self) -> usize {
        let default = self.max_num_seqs.max(8);
        self.prefix_checkpoints.unwrap_or(default)
    }

    /// Bytes of host memory for caches that leave the device.
    pub(super) fn swap_bytes(&self) -> u64 {
        (self.swap_space * f64::from(1 << 30)) as u64
    }

    /// The dtype of the latent cache; `None` for the device's own.
    pub(super) fn cache(&self) -> Option<Dtype> {
        match self.kv_cache_dtype {
            CacheName::Auto => None,
            CacheName::F32 => Some(Dtype::F32),
            CacheName::F16 => Some(Dtype::F16),
            CacheName::Bf16 => Some(Dtype::Bf16),
        }
    }
}

/// Transfers of caches between workers.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "KV cache transfer")]
pub(super) struct TransferFlags {
    /// Port on which this worker sends caches to decode workers, at --dyn-host; 0 picks a free one, which Dynamo tells them. Where other
    /// machines reach that address, KIMI_LINEAR_KV_SECRET must hold a secret that all workers share.
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with_all = ["kv_transfer", "kv_transfer_config"])]
    transfer_port: u16,
    /// Another address to listen on, as listen:HOST:PORT.
    #[arg(
        long,
        value_name = "listen:HOST:PORT",
        conflicts_with = "kv_transfer_config"
    )]
    kv_transfer: Option<String>,
    /// The same as JSON, with vLLM's keys: kv_role (kv_producer, kv_consumer, kv_both), kv_ip, kv_port, kv_load_failure_policy
    /// (recompute, fail), kv_connector_extra_config (secret_file, tls_cert, tls_key, tls_ca, advertised_host and more).
    #[arg(long, value_name = "JSON")]
    kv_transfer_config: Option<String>,
}

impl TransferFlags {
    /// Whether there is a secret: in the variable, or in a file that the JSON names.
    pub(super) fn has_secret(&self) -> bool {
        let json = self.kv_transfer_config.as_ref();
        let file = json.is_some_and(|json| json.contains("\"secret_file\""));
        file || std::env::var(SECRET).is_ok_and(|secret| !secret.is_empty())
    }

    /// How this worker takes part in transfers; `host` is its address.
    pub(super) fn config(&self, host: IpAddr) -> Result<KvTransfer> {
        let secret = std::env::var(SECRET).ok().filter(|it| !it.is_empty());
        let secret = secret.as_deref().map(str::as_bytes);
        if let Some(json) = &self.kv_transfer_config {
            return Ok(KvTransfer::from_json(json, secret)?);
        }
        let short = match &self.kv_transfer {
            Some(short) => short.clone(),
            None => match host {
                IpAddr::V4(_) => format!("listen:{host}:{}", self.transfer_port),
                IpAddr::V6(_) => format!("listen:[{host}]:{}", self.transfer_port),
            },
        };
        let config = KvTransfer::from_short(&short, secret)?;
        if config.listen.is_none() {
            bail!(
                "--kv-transfer {short}: it should be listen:HOST:PORT; Dynamo tells a decode worker where each request's caches are"
            );
        }
        // Its role may change.
        Ok(KvTransfer {
            fetch: true,
            ..config
        })
    }
}

impl Options {
    /// Refuses what cannot work, before anything is loaded or registered; `host` is this machine's address.
    ///
    /// # Errors
    /// The first flag that cannot work, or a model that is not there.
    pub(super) fn check(&self, host: IpAddr) -> Result<()> {
        let fraction = self.engine.gpu_memory_utilization;
        ensure!(
            fraction > 0.0 && fraction <= 1.0,
            "--gpu-memory-utilization should be above 0 and at most 1, but is {fraction}"
        );
        let swap = self.engine.swap_space;
        ensure!(
            (0.0..=1e9).contains(&swap),
            "--swap-space should be a number of GiB, 0 or more, but is {swap}"
        );
        self.engine.prefill_chunk()?;
        ensure!(
            !self.place.cluster().is_empty(),
            "--cluster: the name is empty"
        );
        let path = self.model.path()?;
        ensure!(
            path.exists(),
            "--model {}: there is no such folder or file",
            path.display()
        );
        let config = self.transfer.config(host)?;
        self.parameters.pair(&config, self.transfer.has_secret())?;
        can_be(self.place.role(), config.listen.is_some(), config.fetch)
            .context("--kv-transfer-config")
    }
}

/// Whether a worker with these transfers can have this role.
pub(super) fn can_be(role: Role, sends: bool, fetches: bool) -> Result<()> {
    match role {
        Role::Prefill if !sends => {
            bail!("a prefill worker sends caches: kv_role should be kv_producer or kv_both")
        }
        Role::Decode if !fetches => {
            bail!("a decode worker fetches caches: kv_role should be kv_consumer or kv_both")
        }
        _ => Ok(()),
    }
}

/// A number of tokens, one or more: `8192`, `128K` (a power of 1,024) or `128k` (of 1,000).
fn tokens(text: &str) -> Result<usize, String> {
    let wrong = || {
        format!("`{text}` is not a number of tokens such as 8192, 128K (131,072) or 128k (128,000)")
    };
    let (digits, scale) = match text.char_indices().last() {
        Some((end, 'k')) => (&text[..end], 1000),
        Some((end, 'K')) => (&text[..end], 1 << 10),
        Some((end, 'm')) => (&text[..end], 1_000_000),
        Some((end, 'M')) => (&text[..end], 1 << 20),
        _ => (text, 1),
    };
    let count = digits.parse::<usize>().ok();
    let count = count.and_then(|count| count.checked_mul(scale));
    count.filter(|count| *count > 0).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use std::net::Ipv4Addr;

    const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    fn options(flags: &[&str]) -> Options {
        let all = [&["kimi-linear-worker"], flags].concat();
        Options::try_parse_from(all).unwrap()
    }

    fn said(flags: &[&str]) -> String {
        format!("{:#}", options(flags).check(HERE).unwrap_err())
    }

    #[test]
    fn the_flags_are_consistent() {
        Options::command().debug_assert();
    }

    #[test]
    fn prfaas_is_a_prefill_worker_of_another_cluster() {
        let place = options(&["--role", "prfaas"]).place;
        assert_eq!((place.role(), place.cluster()), (Role::Prefill, "prfaas"));
        let place = options(&["--role", "prefill"]).place;
        assert_eq!((place.role(), place.cluster()), (Role::Prefill, "local"));
        let place = options(&["--role", "prfaas", "--cluster", "west"]).place;
        assert_eq!(place.cluster(), "west");
    }

    #[test]
    fn transfers_go_both_ways_unless_the_json_says_otherwise() {
        let config = options(&["--transfer-port", "9000"]).transfer;
        let config = config.config(HERE).unwrap();
        assert_eq!(config.listen, Some(("127.0.0.1".to_owned(), 9000)));
        assert!(config.fetch);
        let json = r#"{"kv_role": "kv_producer"}"#;
        let error = said(&["--role", "decode", "--kv-transfer-config", json]);
        assert!(error.contains("a decode worker fetches caches"), "{error}");
        let json = r#"{"kv_role": "kv_consumer"}"#;
        let error = said(&["--role", "prfaas", "--kv-transfer-config", json]);
        assert!(error.contains("a prefill worker sends caches"), "{error}");
        let error = said(&["--kv-transfer", "connect:127.0.0.1:9000"]);
        assert!(error.contains("should be listen:HOST:PORT"), "{error}");
    }

    #[test]
    fn what_cannot_work_is_refused_before_anything_starts() {
        let cases: [(&[&str], &str); 8] = [
            (&["--gpu-memory-utilization", "0"], "above 0"),
            (&["--swap-space=-1"], "0 or more"),
            (&["--max-num-batched-tokens", "80"], "at least 97"),
            (&["--cluster", ""], "the name is empty"),
            (&["--model", "/nonexistent"], "no such folder"),
            (&["--parameter-drop", "layers"], "needs --parameter-listen"),
            (&["--parameter-peer", "127.0.0.1:9000"], "experts or layers"),
            (
                &[
                    "--parameter-drop",
                    "experts",
                    "--parameter-listen",
                    "0.0.0.0:9000",
                ],
                "whoever reaches this port",
            ),
        ];
        for (flags, expected) in cases {
            let error = said(flags);
            assert!(error.contains(expected), "{flags:?}: {error}");
        }
        assert!(options(&[]).check(HERE).is_ok());
        assert_eq!(tokens("128K"), Ok(131_072));
        assert_eq!(tokens("4k"), Ok(4000));
        assert!(tokens("0").is_err() && tokens("many").is_err());
    }

    #[test]
    fn the_models_name_is_that_of_its_folder() {
        assert_eq!(options(&[]).model.name(), "kimi-linear-demo");
        let folder = std::env::temp_dir().join("Kimi-Linear-Name");
        std::fs::create_dir_all(&folder).unwrap();
        let named = options(&["--model", folder.to_str().unwrap()]);
        assert_eq!(named.model.name(), "Kimi-Linear-Name");
        let given = options(&["--served-model-name", "kimi"]);
        assert_eq!(given.model.name(), "kimi");
        std::fs::remove_dir(folder).unwrap();
    }
}
