//! `kimi-linear plan`: two clusters and a link; which prompts are offloaded, and how many nodes prefill and decode.

mod burst;
mod clusters;
mod parse;
mod replay;
mod scheduler;

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, Subcommand, ValueEnum};
use kimi_linear_plan::model::Averages;
use kimi_linear_plan::plan::{Task, plan};
use kimi_linear_plan::report;
use kimi_linear_plan::trace::Trace;

use super::options::parse_tokens_u32;
use clusters::Clusters;
use parse::Requests;

/// Options of `plan`.
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    what: Option<What>,
    #[command(flatten)]
    plan: PlanArguments,
}

#[derive(Subcommand)]
enum What {
    /// Simulate a request trace in virtual time on PrfaaS, on one homogeneous cluster and on a naive split, side by side.
    ///
    /// Each of the three is first planned for the trace's uncached prompt lengths (as `plan --averages work` does). PrfaaS then runs under the
    /// scheduler, the other two as planned. With --burst, replicas of one model are simulated instead, which drop duplicated parameters
    /// to free memory for caches.
    Replay(Box<replay::Arguments>),
}

#[derive(Args)]
struct PlanArguments {
    #[command(flatten)]
    clusters: Clusters,
    /// Prompt lengths: lognormal:MU,SIGMA,LOW,HIGH (mean and deviation of the logarithm, limits in tokens), or a trace file; tokens that an
    /// earlier prompt has already put into the cache are not counted.
    #[arg(long, value_name = "LENGTHS", default_value = "lognormal:9.90,1.00,128,128000", value_parser = Requests::parse)]
    requests: Requests,
    /// Mean number of output tokens per request. Default: 1024, or the mean of the trace.
    #[arg(long, value_name = "N", value_parser = parse_tokens_u32)]
    output_tokens: Option<u32>,
    /// How the mean work of a stage is computed. Default: `lengths` for a distribution, `work` for a trace.
    #[arg(long, value_enum)]
    averages: Option<AveragesName>,
    /// Requests per second for the time to first token under load. Default: 0.9 times the throughput of the slowest deployment.
    #[arg(long, value_name = "RATE", value_parser = parse::rate)]
    rate: Option<f64>,
    /// Random seed of the requests of that load.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Write a plot of the throughput bounds that the search compared.
    #[arg(long, value_name = "OUT.svg", visible_alias = "plot")]
    svg: Option<PathBuf>,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

/// How a stage's mean work follows from the lengths.
#[derive(Clone, Copy, ValueEnum)]
enum AveragesName {
    /// The work of a prompt of mean length, as in the paper's equations.
    Lengths,
    /// The mean work of all prompts; more than `lengths` if a few prompts are very long.
    Work,
}

/// Default output tokens per request, as in the paper's case study.
const OUTPUT_TOKENS: u32 = 1024;

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    match &arguments.what {
        Some(What::Replay(arguments)) => replay::run(arguments),
        None => run_plan(&arguments.plan),
    }
}

fn run_plan(arguments: &PlanArguments) -> Result<()> {
    let (lengths, output_tokens, averages) = match &arguments.requests {
        Requests::LogNormal(lognormal) => {
            let lengths = lognormal.lengths()?;
            (lengths, f64::from(OUTPUT_TOKENS), AveragesName::Lengths)
        }
        Requests::File(path) => {
            let trace = Trace::read(path)?;
            (trace.uncached()?, trace.output_tokens(), AveragesName::Work)
        }
    };
    let (deployment, homogeneous_nodes) = arguments.clusters.deployment()?;
    let task = Task {
        deployment,
        homogeneous_nodes,
        link: arguments.clusters.link(),
        lengths,
        output_tokens: arguments.output_tokens.map_or(output_tokens, f64::from),
        averages: match arguments.averages.unwrap_or(averages) {
            AveragesName::Lengths => Averages::OfLengths,
            AveragesName::Work => Averages::OfWork,
        },
    };
    let plan = plan(&task, arguments.rate, arguments.seed)?;
    if let Some(file) = &arguments.svg {
        write(file, &report::plan_svg(&plan)?)?;
    }
    if arguments.json {
        return super::print_json(&plan);
    }
    std::io::stdout().write_all(report::plan_text(&plan).as_bytes())?;
    Ok(())
}

fn write(file: &Path, text: &str) -> Result<()> {
    std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}
