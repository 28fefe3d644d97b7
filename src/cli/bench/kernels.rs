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
    /// Another device, measured as well and shown beside it in the same table: a backend's name, or that and a device's number.
    #[arg(long, value_name = "BACKEND[:N]", value_parser = DeviceOptions::parse)]
    beside: Vec<DeviceOptions>,
    /// The shape whose sizes kernels run at: 48b, tiny, or a model's folder, config.json or GGUF.
    #[arg(long, value_name = "SHAPE", default_value = "48b")]
    shape: String,
    /// Only what has this in its name.
    #[arg(long, value_name = "S")]
    filter: Option<String>,
    /// Short prompts, contexts and batches, for trying this out.
    #[arg(long)]
    small: bool,
    /// Leave out the short list of every other operation at the published sizes.
    #[arg(long)]
    no_operations: bool,
    /// Run and check everything once and take no timings.
    #[arg(long)]
    dry_run: bool,
    /// Print one JSON object.
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
