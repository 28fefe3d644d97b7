//! The flags of `kimi-linear-frontend`, with the names that `kimi-linear serve` has for the same.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, ValueEnum};
use dynamo_runtime::pipeline::RouterMode;
use kimi_linear::llm::LlmFiles;
use kimi_linear::server::{ReasoningParser, ServerOptions};
use kimi_linear::tokenizer::ChatTemplate;
use kimi_linear_plan::profile::Profile;
use kimi_linear_plan::scheduler;

use super::http_flags::{HttpFlags, SamplingFlags};
use super::routed::Limits;
use crate::policy::Threshold;
use crate::policy::planner::{Expected, Planner};
use crate::settings::NetworkFlags;

/// The name of the demo model.
const DEMO: &str = "kimi-linear-demo";

/// All flags of a frontend.
#[derive(Parser, Clone, Debug)]
#[command(
    name = "kimi-linear-frontend",
    version,
    about = "An HTTP server for OpenAI's and Anthropic's clients in front of kimi-linear-worker, in one cluster or two",
    after_help = AFTER_HELP
)]
pub struct Options {
    #[command(flatten)]
    pub(super) model: ModelFlags,
    #[command(flatten)]
    pub(super) http: HttpFlags,
    #[command(flatten)]
    pub(super) sampling: SamplingFlags,
    #[command(flatten)]
    pub(super) network: NetworkFlags,
    #[command(flatten)]
    pub(super) routing: RoutingFlags,
    #[command(flatten)]
    pub(super) policy: PolicyFlags,
    #[command(flatten)]
    pub(super) status: StatusFlags,
}

const AFTER_HELP: &str = "\
Example, on one machine:
  kimi-linear-worker --role prefill &
  kimi-linear-worker --role decode &
  kimi-linear-frontend --port 8000 --status-port 8001

Until there are workers for all roles, requests are answered with 503 and what is missing. GET /cluster on the status port shows workers, \
threshold and link; PUT /threshold {\"threshold\": 4096} moves the threshold. Ctrl-C or SIGTERM finishes running answers and refuses new \
requests; a second signal exits at once. Variables of Dynamo that have no flag here (DYN_LOG, DYN_TCP_TLS_*, ETCD_*) are read by Dynamo.";

/// The model, of which the frontend reads the configuration, the tokenizer and the chat template.
#[derive(Args, Clone, Debug)]
pub(super) struct ModelFlags {
    /// Model: a folder with config.json and tokenizer files, or a GGUF; weights are not read. All workers need the same one. Default: the
    /// built-in demo model.
    #[arg(short, long, value_name = "DIR|FILE")]
    model: Option<PathBuf>,
    /// Chat template to use instead of the model's: a Jinja file.
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// Maximum tokens of prompt and answer together. Default: the model's maximum; workers may hold less, and say so.
    #[arg(long, value_name = "N", value_parser = tokens)]
    max_model_len: Option<usize>,
    /// Seed for requests that do not set one. Default: a new seed for each request.
    #[arg(long, value_name = "N")]
    pub(super) seed: Option<u64>,
    /// Order of requests in a worker: of arrival (`fcfs`), or by their field `priority`, lower values first (`priority`).
    #[arg(long, value_name = "POLICY", value_enum, default_value = "fcfs")]
    scheduling_policy: SchedulingPolicy,
    /// Compute every prompt from its first token.
    #[arg(long)]
    no_enable_prefix_caching: bool,
    /// Separate the reasoning of an answer, the text up to </think>, from its text: deepseek_r1, deepseek_v3, glm45, holo2, kimi_k2,
    /// minimax_m2, nemotron_v3, olmo3, qwen3 or step3. Default: it stays in the text.
    #[arg(long, value_name = "NAME")]
    reasoning_parser: Option<ReasoningParser>,
    /// Log size, parameters and duration of each request, without its content.
    #[arg(long)]
    enable_log_requests: bool,
    /// Log each request with its prompt and answer.
    #[arg(long)]
    log_content: bool,
}

/// The order of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum SchedulingPolicy {
    /// First come, first served.
    Fcfs,
    /// By the field `priority` of requests.
    Priority,
}

impl ModelFlags {
    /// The model's name: that of its folder, or that of its file without the extension.
    fn name(&self) -> String {
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

    /// The model's files, without weights.
    pub(super) fn files(&self) -> Result<LlmFiles> {
        let mut files = match &self.model {
            Some(path) => LlmFiles::open(path)?,
            None => LlmFiles::demo()?,
        };
        if let Some(path) = &self.chat_template {
            let named = || format!("--chat-template {}", path.display());
            let source = std::fs::read_to_string(path).with_context(named)?;
            let template = ChatTemplate::replaced_in(&files.files, &source);
            files.template = Some(template.with_context(named)?);
        }
        Ok(files)
    }

    /// The model's folder, where a card's files are if they are not where the worker says.
    pub(super) fn folder(&self) -> Option<&Path> {
        self.model.as_deref().filter(|path| path.is_dir())
    }

    /// Maximum tokens of a prompt and its answer together.
    pub(super) fn context(&self, files: &LlmFiles) -> Result<usize> {
        let most = files.config.model_max_length;
        let Some(length) = self.max_model_len else {
            return Ok(most);
        };
        ensure!(
            (2..=most).contains(&length),
            "--max-model-len {length}: from 2 (a prompt token and a generated one) to {most} tokens, for which the model was made"
        );
        Ok(length)
    }
}

impl Options {
    /// The server's options; `files` are the model's.
    pub(super) fn server(&self, files: &LlmFiles) -> Result<ServerOptions> {
        let model = &self.model;
        Ok(ServerOptions {
            seed: model.seed,
            priorities: model.scheduling_policy == SchedulingPolicy::Priority,
            prefix_caching: !model.no_enable_prefix_caching,
            reasoning_parser: model.reasoning_parser,
            log_requests: model.enable_log_requests,
            log_content: model.log_content,
            sampling_defaults: self.sampling.defaults(&files.files)?,
            ..self.http.options(&model.name())?
        })
    }
}

/// Dynamo's router.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Routing")]
pub(super) struct RoutingFlags {
    /// How workers are chosen: by cached prefixes and load, with the policy of two clusters for prompts (`kv`); the other two know of
    /// neither.
    #[arg(long, value_name = "MODE", value_enum, default_value = "kv")]
    router_mode: ModeName,
    /// Guess from its own decisions what workers have cached, instead of asking them.
    #[arg(long)]
    pub(super) no_kv_events: bool,
    /// How often an answer goes on at another worker when its worker is lost, with the tokens that were generated so far; and how often
    /// one is sent to another worker when the first one is full.
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub(super) migration_limit: u32,
    /// Time within which a new worker must answer before requests are sent to it. One that cannot connect back to this frontend never
    /// does.
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = time)]
    pub(super) probe_timeout: Duration,
    /// Time within which a worker must begin to answer a request. The time that a prompt waits in a worker's queue does not count.
    #[arg(long, value_name = "TIME", default_value = "2m", value_parser = time)]
    dispatch_timeout: Duration,
    /// Time for which a request that no worker can take is tried again, as when the only one of a role is being restarted.
    #[arg(long, value_name = "TIME", default_value = "3s", value_parser = time)]
    retry_for: Duration,
}

/// A router mode's name.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum ModeName {
    /// By cached prefixes and load.
    Kv,
    /// One after the other.
    RoundRobin,
    /// Any.
    Random,
}

impl RoutingFlags {
    pub(super) fn mode(&self) -> RouterMode {
        match self.router_mode {
            ModeName::Kv => RouterMode::KV,
            ModeName::RoundRobin => RouterMode::RoundRobin,
            ModeName::Random => RouterMode::Random,
        }
    }

    pub(super) fn limits(&self) -> Limits {
        Limits {
            dispatch: self.dispatch_timeout,
            retry: self.retry_for,
            migrations: self.migration_limit,
        }
    }
}

/// Which cluster prefills a prompt.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Two clusters")]
pub(super) struct PolicyFlags {
    /// Uncached tokens above which a prompt is prefilled by the PrfaaS cluster: a number; `auto` for what is planned from the profiles and
    /// moved with load and link; `none` to keep all prompts here.
    #[arg(long, value_name = "auto|N|none", default_value_t = Threshold::Auto)]
    pub(super) threshold: Threshold,
    /// Profile of one worker of the PrfaaS cluster: a file written by `kimi-linear bench --profile`, or a built-in one: 48b-h200, 1t-h200 or
    /// 1t-h20.
    #[arg(long, value_name = "PROFILE", default_value = "48b-h200")]
    profile: String,
    /// Profile of one worker of the local cluster. Default: that of --profile.
    #[arg(long, value_name = "PROFILE")]
    local_profile: Option<String>,
    /// Bandwidth of the link out of the PrfaaS cluster in bit/s, such as 100G.
    #[arg(long, value_name = "RATE", default_value = "100G", value_parser = bits)]
    link: f64,
    /// Prompt lengths that are expected before there are any: lognormal:MU,SIGMA,LOW,HIGH, or a trace file of `kimi-linear plan`.
    #[arg(
        long,
        value_name = "LENGTHS",
        default_value = "lognormal:9.90,1.00,128,128000"
    )]
    requests: String,
    /// Mean tokens of an answer that are expected. Default: 1024, or the mean of the trace.
    #[arg(long, value_name = "N")]
    output_tokens: Option<u32>,
    /// Log which worker should change between prefill and decode, and change none.
    #[arg(long)]
    pub(super) no_role_changes: bool,
    #[command(flatten)]
    scheduler: SchedulerFlags,
}

impl PolicyFlags {
    pub(super) fn planner(&self) -> Result<Planner> {
        let prfaas = Profile::open(&self.profile).context("--profile")?;
        let local = match &self.local_profile {
            Some(name) => Profile::open(name).context("--local-profile")?,
            None => prfaas.clone(),
        };
        Ok(Planner {
            prfaas,
            local,
            link_bits_per_second: self.link,
            expected: Expected::parse(&self.requests, self.output_tokens).context("--requests")?,
            options: self.scheduler.options(),
        })
    }
}

/// The scheduler's triggers that depend on how much traffic there is; `kimi-linear plan replay --help` has the reasons.
#[derive(Args, Clone, Debug)]
struct SchedulerFlags {
    /// Number of recent prompts that a threshold search uses.
    #[arg(long, value_name = "N", default_value_t = 2048)]
    window: usize,
    /// Number of prompts to observe before the planned threshold may move.
    #[arg(long, value_name = "N", default_value_t = 256)]
    settle: usize,
    /// Time between threshold searches in normal operation.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = time)]
    search_every: Duration,
    /// Minimum time between searches after a trigger.
    #[arg(long, value_name = "TIME", default_value = "3s", value_parser = time)]
    search_soonest: Duration,
    /// Time between reviews of the split between prefill and decode.
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = time)]
    replan_every: Duration,
    /// Minimum time between two changes of roles.
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = time)]
    convert_pause: Duration,
}

impl SchedulerFlags {
    fn options(&self) -> scheduler::Options {
        scheduler::Options {
            window: self.window.max(1),
            settle: self.settle,
            search_every: self.search_every,
            search_soonest: self.search_soonest,
            replan_every: self.replan_every,
            convert_pause: self.convert_pause,
            ..scheduler::Options::default()
        }
    }
}

/// The status port.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Status")]
pub(super) struct StatusFlags {
    /// Port for the cluster's state (/cluster), the last decisions (/cluster/requests), the threshold (/threshold) and /metrics; 0 picks a
    /// free one, which is logged. It asks for no key. Default: none.
    #[arg(long, value_name = "N")]
    status_port: Option<u16>,
    /// Address of the status port.
    #[arg(long, value_name = "IP", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    status_host: IpAddr,
}

impl StatusFlags {
    pub(super) fn address(&self) -> Option<SocketAddr> {
        self.status_port
            .map(|port| SocketAddr::new(self.status_host, port))
    }
}

/// A number of tokens; `K` and `M` are powers of 1,024, `k` and `m` of 1,000.
fn tokens(text: &str) -> Result<usize, String> {
    let units = [
        ('K', 1 << 10),
        ('M', 1 << 20),
        ('k', 1000),
        ('m', 1_000_000),
    ];
    let unit = units
        .iter()
        .find_map(|(unit, factor)| Some((text.strip_suffix(*unit)?, *factor)));
    let (digits, factor) = unit.unwrap_or((text, 1usize));
    let number = digits.trim().parse::<usize>().ok();
    let number = number.and_then(|number| number.checked_mul(factor));
    number.filter(|number| *number > 0).ok_or_else(|| {
        format!("`{text}` is not a number of tokens such as 8192, 128K (131,072) or 128k (128,000)")
    })
}

/// Bits per second: `100G`, `250M`.
fn bits(text: &str) -> Result<f64, String> {
    let units = [('K', 1e3), ('M', 1e6), ('G', 1e9), ('T', 1e12)];
    let unit = units
        .iter()
        .find_map(|(unit, factor)| Some((text.strip_suffix(*unit)?, *factor)));
    unit.and_then(|(digits, factor)| Some(digits.parse::<f64>().ok()? * factor))
        .filter(|bits| bits.is_finite() && *bits > 0.0)
        .ok_or_else(|| format!("`{text}` is not a bandwidth in bit/s such as 100G or 250M"))
}

/// A time above 0: `10s`, `5m`, `250ms`.
fn time(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).ok();
    time.filter(|time| !time.is_zero())
        .ok_or_else(|| format!("`{text}` is not a time such as 250ms, 10s or 5m"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn options(arguments: &[&str]) -> Result<Options, String> {
        let all = [&["kimi-linear-frontend"], arguments].concat();
        Options::try_parse_from(all).map_err(|error| error.to_string())
    }

    #[test]
    fn the_flags_are_consistent_and_have_their_defaults() {
        Options::command().debug_assert();
        let options = options(&[]).unwrap();
        assert_eq!(options.policy.threshold, Threshold::Auto);
        assert_eq!(options.routing.migration_limit, 3);
        assert_eq!(options.status.address(), None);
        assert_eq!(options.model.name(), DEMO);
        let planner = options.policy.planner().unwrap();
        assert_eq!(planner.options, scheduler::Options::default());
        assert!((planner.link_bits_per_second - 100e9).abs() < 1.0);
        assert!(options.routing.mode().is_kv_routing());
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (flags, expected) in [
            (["--threshold", "many"], "`auto` or `none`"),
            (["--link", "100"], "bit/s"),
            (["--probe-timeout", "0s"], "is not a time"),
            (["--max-model-len", "0"], "number of tokens"),
            (["--router-mode", "direct"], "round-robin"),
        ] {
            let error = options(&flags).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
        let unknown = options(&["--profile", "no-such"]).unwrap();
        let error = format!("{:#}", unknown.policy.planner().unwrap_err());
        assert!(
            error.contains("--profile") && error.contains("48b-h200"),
            "{error}"
        );
    }

    #[test]
    fn the_context_is_the_models_or_less() {
        let context = |length| {
            let options = options(&["--max-model-len", length]).unwrap();
            let files = options.model.files().unwrap();
            options.model.context(&files)
        };
        assert_eq!(context("1K").unwrap(), 1024);
        assert!(context("1").is_err() && context("999M").is_err());
    }
}
