//! `kimi-linear plan replay`: a trace in virtual time.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Args;
use clap::builder::RangedU64ValueParser;
use kimi_linear_plan::compare::{Replays, sweep};
use kimi_linear_plan::lengths::LogNormal;
use kimi_linear_plan::model::Averages;
use kimi_linear_plan::plan::Task;
use kimi_linear_plan::replay::{Arrivals, LinkChange};
use kimi_linear_plan::report;
use kimi_linear_plan::trace::{Generate, Shape, Trace};
use serde_json::json;

use super::super::options::parse_tokens_u32;
use super::burst::{BurstOptions, Output};
use super::clusters::Clusters;
use super::parse::{self, Requests};
use super::scheduler::SchedulerOptions;

/// Options of `plan replay`.
#[derive(Args)]
pub(super) struct Arguments {
    /// Trace file of Mooncake (JSON Lines, whose hash_ids tell shared prefixes), Azure or BurstGPT (CSV), or lognormal:MU,SIGMA,LOW,HIGH to
    /// generate a trace.
    #[arg(value_name = "TRACE", value_parser = Requests::parse)]
    trace: Requests,
    #[command(flatten)]
    clusters: Clusters,
    /// Number of requests to generate.
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    count: usize,
    /// Mean number of requests per second. Default: 1.9 for a generated trace, the file's own rate otherwise.
    #[arg(long, value_name = "RATE", value_parser = parse::rate)]
    rate: Option<f64>,
    /// How the rate of a generated trace varies around its mean: steady, bursts:FACTOR,EVERY,DURATION (such as bursts:3,10m,1m) or
    /// diurnal:AMPLITUDE,PERIOD (such as diurnal:0.5,24h).
    #[arg(long, value_name = "PATTERN", default_value = "steady", value_parser = parse::shape)]
    arrivals: Shape,
    /// Output tokens of each generated request.
    #[arg(long, value_name = "N", default_value_t = super::OUTPUT_TOKENS, value_parser = parse_tokens_u32)]
    output_tokens: u32,
    /// Random seed of a generated trace.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Keep N requests in the system at all times instead of following the trace's arrival times; the throughput is then the capacity.
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    saturate: Option<usize>,
    /// From TIME on the link has this fraction of its bandwidth, such as 10m=0.2. Can be repeated.
    #[arg(long, value_name = "TIME=FRACTION", value_parser = parse::link_change)]
    link_change: Vec<LinkChange>,
    /// Capacity of each cluster's prefix cache in blocks of 512 tokens. Default: no limit, since host memory and disks hold days of traffic.
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    cache_blocks: Option<usize>,
    /// Time that an idle node needs to change between prefill and decode: weights stay, caches are laid out again.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse::time)]
    convert: Duration,
    /// Also simulate every split of the local nodes with N fixed thresholds at capacity (120 requests in the system, or those of
    /// --saturate), and compare the plan with the best of them.
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<u32>::new().range(1..))]
    sweep: Option<u32>,
    /// Write a plot of the simulation over time.
    #[arg(long, value_name = "OUT.svg", visible_alias = "plot")]
    svg: Option<PathBuf>,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
    // Options with a help heading come last: clap puts what follows them under the same heading.
    #[command(flatten)]
    scheduler: SchedulerOptions,
    #[command(flatten)]
    burst: BurstOptions,
}

/// Arrivals a second of a generated trace: nine tenths of what the case study's homogeneous cluster serves.
const RATE: f64 = 1.9;
/// Requests in the system for a sweep: what the case study's nodes work on at a time and a few that wait, so that no stage runs dry.
/// With many more, a prompt would come before the one whose prefix it shares is done, and caches would spare less than they do.
const IN_FLIGHT: usize = 120;

impl Arguments {
    /// The trace and its name.
    fn read(&self) -> Result<(Trace, String)> {
        let (trace, name) = match &self.trace {
            Requests::LogNormal(lognormal) => {
                (self.generate(lognormal, 1.0)?, lognormal.to_string())
            }
            Requests::File(path) => {
                let trace = Trace::read(path)?;
                let trace = match self.rate {
                    Some(rate) => {
                        let times = rate / trace.rate();
                        ensure!(
                            times.is_finite() && times > 0.0,
                            "--rate {rate}: the trace has one moment only, which no rate describes"
                        );
                        trace.faster(times)
                    }
                    None => trace,
                };
                let name = path.file_name().unwrap_or(path.as_os_str());
                (trace, name.to_string_lossy().into_owned())
            }
        };
        Ok((trace, name))
    }

    /// A generated trace at a number of times its rate: bursts stay as long as they are.
    fn generate(&self, lognormal: &LogNormal, times: f64) -> Result<Trace> {
        let generate = Generate {
            lengths: lognormal.lengths()?,
            output: self.output_tokens,
            count: self.count,
            rate: self.rate.unwrap_or(RATE) * times,
            shape: self.arrivals,
            seed: self.seed,
        };
        Ok(generate.trace()?)
    }

    fn run_burst(&self) -> Result<()> {
        let (trace, name) = self.read()?;
        let output = Output {
            name: &name,
            svg: self.svg.as_deref(),
            json: self.json,
        };
        let make = |times: f64| match &self.trace {
            Requests::LogNormal(lognormal) => self.generate(lognormal, times),
            Requests::File(_) => Ok(trace.clone().faster(times)),
        };
        self.burst.run(&make, self.seed, &output)
    }
}

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    if arguments.burst.asked() {
        return arguments.run_burst();
    }
    let (trace, name) = arguments.read()?;
    let (deployment, homogeneous_nodes) = arguments.clusters.deployment()?;
    let task = Task {
        deployment,
        homogeneous_nodes,
        link: arguments.clusters.link(),
        lengths: trace.uncached()?,
        output_tokens: trace.output_tokens(),
        averages: Averages::OfWork,
    };
    let mut changes = arguments.link_change.clone();
    changes.sort_by_key(|change| change.at);
    let replays = Replays {
        scheduler: arguments.scheduler.options(),
        changes,
        cache_blocks: arguments.cache_blocks,
        arrivals: match arguments.saturate {
            Some(in_flight) => Arrivals::Saturated { in_flight },
            None => Arrivals::Traced,
        },
        convert: arguments.convert,
    };
    let in_flight = arguments.saturate.unwrap_or(IN_FLIGHT);
    let ways = match arguments.trace {
        // Drawn lengths do not change over time.
        Requests::LogNormal(_) => task.ways()?,
        Requests::File(_) => task.ways_of(&trace, in_flight)?,
    };
    let replayed = replays.run(&trace, &task, &ways)?;
    let swept = match (arguments.sweep, ways.first()) {
        (Some(points), Some((way, deployment, found))) => {
            let setup = replays.setup(&task, *way, deployment, found);
            Some(sweep(&trace, &setup, in_flight, points)?)
        }
        _ => None,
    };
    if let Some(file) = &arguments.svg {
        super::write(file, &report::replay_svg(&replayed)?)?;
    }
    let (count, rate) = (trace.requests().len(), trace.rate());
    let (prompt, uncached) = (trace.prompt_tokens(), task.lengths.mean());
    if arguments.json {
        return super::super::print_json(&json!({
            "trace": {
                "name": name,
                "requests": count,
                "requests_per_second": rate,
                "prompt_tokens": prompt,
                "uncached_tokens": uncached,
                "output_tokens": task.output_tokens,
            },
            "ways": replayed,
            "sweep": swept,
        }));
    }
    let what = format!(
        "{name}: {count} requests at {rate:.2} a second; prompts of {prompt:.0} tokens, of which {uncached:.0} are new; answers of {:.0}.",
        task.output_tokens
    );
    let mut text = report::replay_text(&what, &replayed);
    if let Some(swept) = &swept {
        text.push_str(&report::sweep_text(swept));
    }
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(())
}
