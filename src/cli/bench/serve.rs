//! `kimi-linear bench serve`: open-loop load against any server that speaks OpenAI's protocol.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::builder::RangedU64ValueParser;
use clap::{Args, ValueEnum};

use super::super::options::parse_tokens;
use super::super::progress::Progress;
use super::client::Target;
use super::load::{self, Planned};
use super::plot;
use super::report::{Report, Slo};

/// The server's API that is called.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Api {
    /// /v1/completions with token ids: prompts have exactly the requested length.
    Completions,
    /// /v1/chat/completions with one-letter words: prompt lengths are approximate.
    Chat,
}

/// Options of `bench serve`.
#[derive(Args)]
pub(super) struct Arguments {
    /// Base URL of the server.
    #[arg(
        long,
        value_name = "URL",
        default_value = "http://127.0.0.1:8000",
        visible_alias = "base-url"
    )]
    url: String,
    /// Model name to request. Default: the first model that the server lists.
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// API key. Default: that in KIMI_LINEAR_API_KEY, VLLM_API_KEY or OPENAI_API_KEY.
    #[arg(long, value_name = "KEY")]
    api_key: Option<String>,
    /// API to call.
    #[arg(long, value_enum, default_value = "completions")]
    api: Api,
    /// Mean number of requests per second; arrivals are a Poisson process.
    #[arg(
        long,
        value_name = "RATE",
        default_value_t = 1.0,
        conflicts_with = "trace",
        visible_alias = "request-rate"
    )]
    rate: f64,
    /// Replay a trace in Mooncake's format: JSON Lines with `timestamp` (ms), `input_length`, `output_length` and `hash_ids`, one for
    /// each block of 512 prompt tokens.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["input_length", "output_length"])]
    trace: Option<PathBuf>,
    /// Replay the trace this many times faster.
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, requires = "trace")]
    speed: f64,
    /// Number of requests. Default: 100, or all of the trace.
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..), visible_alias = "num-prompts")]
    num_requests: Option<usize>,
    /// Prompt length in tokens.
    #[arg(long, value_name = "N", default_value = "256", value_parser = parse_tokens, visible_alias = "random-input-len")]
    input_length: usize,
    /// Maximum answer length in tokens.
    #[arg(long, value_name = "N", default_value = "64", value_parser = parse_tokens, visible_alias = "random-output-len")]
    output_length: usize,
    /// Temperature of the requests; most clients send none, which is 1. With 0 answers are greedy.
    #[arg(long, value_name = "T", default_value_t = 1.0)]
    temperature: f64,
    /// Top-p of the requests: samples from the most likely tokens whose probabilities sum to P. Default: none is sent.
    #[arg(long, value_name = "P")]
    top_p: Option<f64>,
    /// Top-k of the requests, vLLM's field: samples from the K most likely tokens. Default: none is sent.
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(1..))]
    top_k: Option<u32>,
    /// Send vLLM's `ignore_eos`, so that every answer has --output-length tokens; servers without this field may refuse it.
    #[arg(long)]
    ignore_eos: bool,
    /// Draw prompt token ids from 0 to N - 1; ids below 256 exist in every byte-level vocabulary.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    vocabulary: u32,
    /// Random seed of arrival times and prompts.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Goodput target: maximum time to first token in milliseconds.
    #[arg(long, value_name = "MS")]
    slo_ttft_ms: Option<f64>,
    /// Goodput target: maximum mean time per output token, after the first, in milliseconds.
    #[arg(long, value_name = "MS")]
    slo_tpot_ms: Option<f64>,
    /// Write a plot of the latencies to this file.
    #[arg(long, value_name = "OUT.svg")]
    plot: Option<PathBuf>,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let planned = plan(arguments)?;
    // Each request is an open file.
    let _ = rlimit::increase_nofile_limit(u64::MAX);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the client's threads")?;
    let outcomes = runtime.block_on(send(arguments, planned))?;
    let slo = Slo {
        ttft_ms: arguments.slo_ttft_ms,
        tpot_ms: arguments.slo_tpot_ms,
    };
    let report = Report::new(&outcomes, slo);
    if let Some(file) = &arguments.plot {
        plot::draw(file, &outcomes, slo)?;
    }
    if arguments.json {
        super::super::print_json(&report)?;
    } else {
        write!(std::io::stdout(), "{}", report.table())?;
    }
    ensure!(report.completed() > 0, "no request was answered");
    Ok(())
}

fn plan(arguments: &Arguments) -> Result<Vec<Planned>> {
    let positive = |name: &str, value: f64| {
        ensure!(
            value > 0.0 && value.is_finite(),
            "{name} should be above 0, but is {value}"
        );
        Ok(())
    };
    positive("--rate", arguments.rate)?;
    positive("--speed", arguments.speed)?;
    ensure!(
        arguments.temperature >= 0.0 && arguments.temperature.is_finite(),
        "--temperature should be 0 or more, but is {}",
        arguments.temperature
    );
    if let Some(top_p) = arguments.top_p {
        ensure!(
            top_p > 0.0 && top_p <= 1.0,
            "--top-p should be above 0 and at most 1, but is {top_p}"
        );
    }
    let (count, seed) = (arguments.num_requests, arguments.seed);
    if let Some(file) = &arguments.trace {
        return load::trace(file, count, arguments.speed, arguments.vocabulary, seed);
    }
    let lengths = (arguments.input_length, arguments.output_length);
    let count = count.unwrap_or(100);
    Ok(load::poisson(
        arguments.rate,
        count,
        lengths,
        arguments.vocabulary,
        seed,
    ))
}

/// Sends every request at its time.
async fn send(arguments: &Arguments, planned: Vec<Planned>) -> Result<Vec<super::client::Outcome>> {
    let url = arguments.url.trim_end_matches('/');
    let url = url.strip_suffix("/v1").unwrap_or(url).to_owned();
    ensure!(
        url.starts_with("http://"),
        "--url {url}: this client speaks plain http://, without TLS; ask the server behind its proxy"
    );
    let key = arguments.api_key.clone();
    let names = ["KIMI_LINEAR_API_KEY", "VLLM_API_KEY", "OPENAI_API_KEY"];
    let key = key.or_else(|| names.iter().find_map(|name| std::env::var(name).ok()));
    let client = reqwest::Client::builder()
        .no_proxy()
        .tcp_nodelay(true)
        .build()
        .context("cannot make an HTTP client")?;
    let model = match &arguments.model {
        Some(model) => model.clone(),
        None => Target::first_model(&client, &url, key.as_deref()).await?,
    };
    let target = Arc::new(Target {
        client,
        url,
        key,
        model,
        chat: arguments.api == Api::Chat,
        temperature: arguments.temperature,
        top_p: arguments.top_p,
        top_k: arguments.top_k,
        ignore_eos: arguments.ignore_eos,
    });
    let progress = Arc::new(Progress::count("answered", planned.len()));
    let begin = Instant::now();
    let tasks: Vec<_> = planned
        .into_iter()
        .map(|planned| {
            let (target, progress) = (Arc::clone(&target), Arc::clone(&progress));
            tokio::spawn(async move {
                let outcome = target.run(&planned, begin).await;
                progress.add_one();
                outcome
            })
        })
        .collect();
    let mut outcomes = Vec::with_capacity(tasks.len());
    for task in tasks {
        outcomes.push(task.await.context("a request was lost")?);
    }
    progress.finish();
    Ok(outcomes)
}
