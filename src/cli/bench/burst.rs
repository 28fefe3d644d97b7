//! `kimi-linear bench burst`: replicas in this process under a burst of requests, with and without dropping parameters.

use std::io::Write;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use clap::Args;
use clap::builder::RangedU64ValueParser;
use kimi_linear::backend::Parallelism;
use kimi_linear::data_parallel::{DataParallelOptions, LoadedReplicas, ParameterDrop, PoolSizes};
use kimi_linear::engine::{
    EngineClient, EngineOptions, Event, FinishReason, MemoryPlanner, Request,
};
use kimi_linear_plan::burst::outcome::Spread;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use serde::Serialize;

use super::super::data_parallel::{self, DropName};
use super::super::options::{
    CacheOptions, DeviceOptions, ModelOptions, WeightOptions, parse_tokens,
};

/// How often the memory of all devices is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// Options of `bench burst`.
#[derive(Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    weights: WeightOptions,
    #[command(flatten)]
    device: DeviceOptions,
    #[command(flatten)]
    cache: CacheOptions,
    /// Number of replicas.
    #[arg(long, visible_alias = "dp", value_name = "N", default_value_t = 2, value_parser = RangedU64ValueParser::<usize>::new().range(1..=64))]
    data_parallel_size: usize,
    /// What replicas drop, a run for each.
    #[arg(
        long,
        value_name = "WHAT,..",
        value_enum,
        value_delimiter = ',',
        default_value = "none,experts"
    )]
    parameter_drop: Vec<DropName>,
    /// MiB of each device for weights, caches and activations.
    #[arg(long, value_name = "MIB")]
    memory_mib: u64,
    /// Maximum number of sequences that run at the same time, of each replica.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = RangedU64ValueParser::<usize>::new().range(1..=4096))]
    max_num_seqs: usize,
    /// Maximum tokens of prompt and answer together.
    #[arg(long, value_name = "N", default_value = "2048", value_parser = parse_tokens)]
    max_model_len: usize,
    /// Maximum prompt tokens per step.
    #[arg(long, value_name = "N", default_value = "512", value_parser = parse_tokens)]
    prefill_chunk: usize,
    /// Mean number of requests per second; arrivals are a Poisson process.
    #[arg(long, value_name = "RATE", default_value_t = 1.0)]
    request_rate: f64,
    /// How many times that many arrive in the burst.
    #[arg(long, value_name = "FACTOR", default_value_t = 5.0)]
    burst_factor: f64,
    /// Seconds before the burst.
    #[arg(long, value_name = "SECONDS", default_value_t = 20.0)]
    burst_start: f64,
    /// Seconds of the burst.
    #[arg(long, value_name = "SECONDS", default_value_t = 20.0)]
    burst_length: f64,
    /// Seconds in which requests arrive.
    #[arg(long, value_name = "SECONDS", default_value_t = 120.0)]
    seconds: f64,
    /// Mean length of a prompt in tokens; each is between a half and three halves of that.
    #[arg(long, value_name = "N", default_value = "128", value_parser = parse_tokens)]
    input_length: usize,
    /// Mean length of an answer in tokens, likewise.
    #[arg(long, value_name = "N", default_value = "128", value_parser = parse_tokens)]
    output_length: usize,
    /// Random seed of arrival times, lengths and prompts: the same for all runs.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Print one JSON array instead of text.
    #[arg(long)]
    json: bool,
}

/// A request of the load.
struct Planned {
    /// Seconds from the start.
    at: f64,
    request: Request,
}

/// What one run was like.
#[derive(Serialize)]
struct Row {
    parameter_drop: ParameterDrop,
    requests: usize,
    /// From arrival to the first token.
    ttft_seconds: Spread,
    /// From the first to the last token, by the number of tokens after the first.
    tpot_seconds: Spread,
    tokens_per_second: f64,
    preemptions: u64,
    drops: u64,
    restores: u64,
    /// Mean seconds of a drop and of a restore.
    drop_seconds: f64,
    restore_seconds: f64,
    /// Seconds with dropped parameters.
    dropped_seconds: f64,
    whole: PoolSizes,
    #[serde(skip_serializing_if = "Option::is_none")]
    dropped: Option<PoolSizes>,
    /// The most bytes that a device held, by its own count.
    most_bytes: u64,
}

/// The times of one answer.
#[derive(Default)]
struct Times {
    first: Option<f64>,
    last: f64,
    tokens: usize,
    ended: Option<Result<FinishReason, String>>,
}

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let config = arguments.model.config()?;
    ensure!(
        arguments.request_rate > 0.0 && arguments.burst_factor > 0.0 && arguments.seconds > 0.0,
        "--request-rate, --burst-factor and --seconds should be above 0"
    );
    let longest = 3 * (arguments.input_length + arguments.output_length) / 2;
    ensure!(
        longest <= arguments.max_model_len,
        "prompts and answers have up to {longest} tokens together, more than --max-model-len {}",
        arguments.max_model_len
    );
    let planned = plan(arguments, config.vocab_size);
    let mut rows = Vec::new();
    for name in &arguments.parameter_drop {
        let row = measure(arguments, name.form(), &planned)?;
        if !arguments.json {
            print(&row)?;
        }
        rows.push(row);
    }
    match arguments.json {
        true => super::super::print_json(&rows),
        false => Ok(()),
    }
}

/// The requests, in the order of their arrival.
fn plan(arguments: &Arguments, vocabulary: usize) -> Vec<Planned> {
    let mut rng = SmallRng::seed_from_u64(arguments.seed);
    let burst = arguments.burst_start..arguments.burst_start + arguments.burst_length;
    let most = arguments.request_rate * arguments.burst_factor.max(1.0);
    let (mut at, mut planned) = (0.0, Vec::new());
    loop {
        // Thinned from the highest rate, so that the rate changes at the burst's edges.
        at += -(1.0 - rng.random::<f64>()).ln() / most;
        if at >= arguments.seconds {
            return planned;
        }
        let factor = if burst.contains(&at) {
            arguments.burst_factor
        } else {
            1.0
        };
        if rng.random::<f64>() * most >= arguments.request_rate * factor {
            continue;
        }
        let mut length = |mean: usize| rng.random_range(mean.div_ceil(2)..=(3 * mean / 2).max(1));
        let (prompt, answer) = (
            length(arguments.input_length),
            length(arguments.output_length),
        );
        let ids = (0..prompt).map(|_| rng.random_range(0..vocabulary.min(256) as u32));
        planned.push(Planned {
            at,
            request: Request::new(ids.collect(), answer),
        });
    }
}

/// Loads replicas of their own.
fn load(arguments: &Arguments, form: ParameterDrop) -> Result<LoadedReplicas> {
    let files = arguments.model.llm(None, arguments.weights)?;
    let devices = arguments.device.open_ranks(arguments.data_parallel_size)?;
    let Some(first) = devices.first() else {
        bail!("there is no device");
    };
    let planner = MemoryPlanner {
        sequences: arguments.max_num_seqs,
        context: Some(arguments.max_model_len),
        prefill_chunk: arguments.prefill_chunk,
        checkpoints: 8,
        blocks: None,
        memory: Some(arguments.memory_mib << 20),
        speculative: 0,
        weights: 0,
        degrees: Parallelism::SINGLE,
        cache: arguments.cache.dtype(first.device()),
    };
    let options = DataParallelOptions {
        planner,
        engine: EngineOptions::default(),
        drop: form,
        automatic: true,
    };
    data_parallel::load(files, devices, &options)
}

/// One run.
fn measure(arguments: &Arguments, form: ParameterDrop, planned: &[Planned]) -> Result<Row> {
    let loaded = load(arguments, form)?;
    let client = Arc::new(loaded.client);
    let (most, over) = (Mutex::new(0), AtomicBool::new(false));
    let start = Instant::now();
    let times = std::thread::scope(|scope| {
        scope.spawn(|| watch(&*client, &over, &most));
        let times = send(&*client, planned, start);
        over.store(true, Ordering::Relaxed);
        times
    })?;
    let seconds = start.elapsed().as_secs_f64();
    let status = client.status()?;
    let parameters = client.parameters().unwrap_or_default();
    let first = parameters.replicas.first().cloned().unwrap_or_default();
    let mean = |seconds: f64, count: u64| seconds / count.max(1) as f64;
    let sorted = |values: Vec<f64>| {
        let mut values = values;
        values.sort_by(f64::total_cmp);
        Spread::of_sorted(&values)
    };
    let arrived = planned.iter().zip(&times);
    let ttft = arrived.filter_map(|(planned, it)| Some(it.first? - planned.at));
    let long = times.iter().filter(|it| it.tokens > 1);
    let tpot = long.filter_map(|it| Some((it.last - it.first?) / (it.tokens - 1) as f64));
    let tokens: usize = times.iter().map(|it| it.tokens).sum();
    let [_, dropping, dropped, restoring, _] = first.seconds;
    let most_bytes = *most.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(Row {
        parameter_drop: form,
        requests: times.len(),
        ttft_seconds: sorted(ttft.collect()),
        tpot_seconds: sorted(tpot.collect()),
        tokens_per_second: tokens as f64 / seconds,
        preemptions: status.preemptions,
        drops: parameters.drops,
        restores: parameters.restores,
        drop_seconds: mean(dropping, parameters.drops),
        restore_seconds: mean(restoring, parameters.restores),
        dropped_seconds: dropped,
        whole: loaded.states.whole,
        dropped: loaded.states.dropped.into_values().next_back(),
        most_bytes,
    })
}

/// Sends the requests at their times, whether or not earlier ones have ended, and waits for all answers.
fn send(client: &dyn EngineClient, planned: &[Planned], start: Instant) -> Result<Vec<Times>> {
    let times: Arc<Vec<Mutex<Times>>> =
        Arc::new(planned.iter().map(|_| Mutex::default()).collect());
    let (ended, all) = std::sync::mpsc::channel();
    for (index, one) in planned.iter().enumerate() {
        let wait = Duration::from_secs_f64(one.at).saturating_sub(start.elapsed());
        std::thread::sleep(wait);
        let (times, ended) = (Arc::clone(&times), ended.clone());
        let sink = move |event: Event| {
            let mut it = times[index].lock().unwrap_or_else(PoisonError::into_inner);
            match event {
                Event::Token { .. } => {
                    it.last = start.elapsed().as_secs_f64();
                    it.first = it.first.or(Some(it.last));
                    it.tokens += 1;
                }
                Event::Finished { reason, .. } => it.ended = Some(Ok(reason)),
                Event::Failed(error) => it.ended = Some(Err(error.to_string())),
                _ => {}
            }
            if it.ended.is_some() {
                // The receiver waits for all of them.
                let _ = ended.send(());
            }
            ControlFlow::Continue(())
        };
        client.submit_all(vec![(one.request.clone(), Box::new(sink))]);
    }
    drop(ended);
    for _ in planned {
        all.recv()?;
    }
    let times = times.iter().map(|it| {
        let mut it = it.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *it)
    });
    let times: Vec<Times> = times.collect();
    let failed = times
        .iter()
        .find_map(|it| it.ended.as_ref()?.as_ref().err());
    match failed {
        Some(error) => bail!("a request failed: {error}"),
        None => Ok(times),
    }
}

/// Notes the most bytes that a device holds, until it is over.
fn watch(client: &dyn EngineClient, over: &AtomicBool, most: &Mutex<u64>) {
    while !over.load(Ordering::Relaxed) {
        let parameters = client.parameters().unwrap_or_default();
        let held = parameters.replicas.iter().map(|it| it.memory.total());
        let mut most = most.lock().unwrap_or_else(PoisonError::into_inner);
        *most = held.fold(*most, u64::max);
        drop(most);
        std::thread::sleep(LOOK);
    }
}

fn print(row: &Row) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let Row {
        ttft_seconds: ttft,
        tpot_seconds: tpot,
        ..
    } = row;
    writeln!(out, "--parameter-drop {}", row.parameter_drop.name())?;
    writeln!(
        out,
        "  {} requests, {:.1} tokens/s, {} preemptions",
        row.requests, row.tokens_per_second, row.preemptions
    )?;
    writeln!(
        out,
        "  TTFT P50 / P90 / P99 / max, s: {:.2} / {:.2} / {:.2} / {:.2}; TPOT P50 / P99, ms: {:.0} / {:.0}",
        ttft.p50,
        ttft.p90,
        ttft.p99,
        ttft.max,
        1e3 * tpot.p50,
        1e3 * tpot.p99
    )?;
    let PoolSizes { slots, blocks } = row.whole;
    write!(out, "  {slots} slots and {blocks} blocks for each replica")?;
    if let Some(PoolSizes { slots, blocks }) = row.dropped {
        write!(
            out,
            ", {slots} and {blocks} when dropped: {} drops ({:.3} s), {} restores ({:.3} s), {:.1} s dropped; at most {} MiB of a device",
            row.drops,
            row.drop_seconds,
            row.restores,
            row.restore_seconds,
            row.dropped_seconds,
            row.most_bytes >> 20
        )?;
    }
    writeln!(out)?;
    Ok(())
}
