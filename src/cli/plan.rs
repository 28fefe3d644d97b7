//! `kimi-linear plan`: two clusters and a link, which prompts cross it, and how many nodes do what.

mod burst;
mod clusters;
mod parse;
mod replay;
mod scheduler;

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::builder::RangedU64ValueParser;
use clap::{Args, Subcommand, ValueEnum};
use kimi_linear_plan::model::Averages;
use kimi_linear_plan::plan::{Task, plan};
use kimi_linear_plan::report;
use kimi_linear_plan::trace::Trace;

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
    /// Replay a trace of requests in virtual time: PrfaaS, one homogeneous cluster, and a naive split, side by side.
    ///
    /// Each way is planned for the trace's uncached lengths first (`plan --averages work`). PrfaaS then runs under the scheduler, the other two
    /// as planned. With --burst, replicas of one model whose duplicated parameters make room for caches.
    Replay(Box<replay::Arguments>),
}

#[derive(Args)]
struct PlanArguments {
    #[command(flatten)]
    clusters: Clusters,
    /// Prompts: lognormal:MU,SIGMA,LOW,HIGH in tokens, or a trace's file, of which the tokens count that no earlier prompt has cached.
    #[arg(long, value_name = "D", default_value = "lognormal:9.90,1.00,128,128000", value_parser = Requests::parse)]
    requests: Requests,
    /// Mean tokens of an answer; by default 1024, or a trace's own.
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<u32>::new().range(1..))]
    output_tokens: Option<u32>,
    /// How a stage's mean work follows from the lengths; by default the paper's way for a distribution, the exact one for a trace.
    #[arg(long, value_enum)]
    averages: Option<AveragesName>,
    /// Requests a second for the time to the first token under load; by default nine tenths of what the weakest way serves.
    #[arg(long, value_name = "R", value_parser = parse::rate)]
    rate: Option<f64>,
    /// Seeds the requests of that load.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Draw the bounds that the search saw, as SVG.
    #[arg(long, value_name = "OUT.svg")]
    svg: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// How a stage's mean work follows from the lengths.
#[derive(Clone, Copy, ValueEnum)]
enum AveragesName {
    /// What a prompt of the mean length takes, as in the paper's equations.
    Lengths,
    /// The mean of what the prompts take, which is more where a few are very long.
    Work,
}

/// Tokens of an answer where nothing tells: the paper's case study.
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
