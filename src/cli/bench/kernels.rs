//! `kimi-linear bench kernels`: single kernels and operations at a shape's sizes.

use std::io::Write;

use anyhow::{Result, ensure};
use clap::Args;
use kimi_linear::bench::kernels::{Options, Report, run as run_kernels};
use kimi_linear::bench::{Effort, report};
use kimi_linear::conformance::bench::{BenchReport, bench_ops};
use kimi_linear::conformance::floors::Sizes;

use super::super::options::DeviceOptions;

/// Options of `bench kernels`.
#[derive(Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    device: DeviceOptions,
    /// Measure this device too and show it in the same table, such as wgpu or cuda:1. Can be repeated.
    #[arg(long, value_name = "BACKEND[:N]", value_parser = DeviceOptions::parse)]
    beside: Vec<DeviceOptions>,
    /// Shape that gives the kernels' sizes: 48b, tiny, or the path of a model's folder, config.json or GGUF.
    #[arg(long, value_name = "SHAPE", default_value = "48b")]
    shape: String,
    /// Run only kernels and operations whose name contains TEXT.
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// Use short prompts, contexts and batches (a quick trial).
    #[arg(long)]
    small: bool,
    /// Skip the table of all other operations at the published sizes.
    #[arg(long)]
    no_operations: bool,
    /// Run and check everything once without timing it.
    #[arg(long)]
    dry_run: bool,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let options = Options {
        config: super::super::options::config_of(&arguments.shape)?,
        sizes: if arguments.small {
            Sizes::small()
        } else {
            Sizes::published()
        },
        effort: (!arguments.dry_run).then(Effort::default),
        filter: arguments.filter.clone(),
    };
    let devices: Vec<&DeviceOptions> = [&arguments.device]
        .into_iter()
        .chain(&arguments.beside)
        .collect();
    let mut reports: Vec<Report> = Vec::new();
    for device in &devices {
        let report = run_kernels(&mut || device.open(), &options, &mut |row| {
            tracing::info!(
                name = row.name,
                seconds = row.time.map(|time| time.seconds),
                error = row.error,
                "kernel"
            );
        })?;
        reports.push(report);
    }
    // They are at the published sizes whatever the shape, and only there to be timed.
    let mut operations: Vec<BenchReport> = Vec::new();
    if !arguments.dry_run && !arguments.no_operations && !arguments.small {
        for device in &devices {
            let filter = arguments.filter.as_deref();
            let make = &mut || device.open();
            operations.push(bench_ops(make, filter, &mut |_| {})?);
        }
    }
    let nothing = reports.iter().all(|report| report.rows.is_empty())
        && operations.iter().all(|report| report.rows.is_empty());
    ensure!(
        !nothing,
        "no kernel's and no operation's name contains `{}`",
        arguments.filter.as_deref().unwrap_or_default()
    );
    if arguments.json {
        let all = serde_json::json!({ "kernels": reports, "operations": operations });
        return super::super::print_json(&all);
    }
    let mut stdout = std::io::stdout();
    write!(stdout, "{}", report::kernels(&reports))?;
    write!(stdout, "{}", report::operations(&operations))?;
    Ok(())
}
