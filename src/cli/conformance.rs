//! `kimi-linear conformance`: proof that this machine's devices and drivers compute the right thing.

use std::io::Write;

use anyhow::{Result, bail};
use clap::Args;
use kimi_linear::conformance::{Options, report};

use super::options::DeviceOptions;

/// Options of `conformance`.
#[derive(Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    device: DeviceOptions,
    /// Run only cases whose name contains this, such as `kda_chunk` or `mla`.
    #[arg(long, value_name = "S")]
    filter: Option<String>,
    /// How often what must repeat bit by bit is repeated.
    #[arg(long, value_name = "N", default_value_t = Options::default().repeats)]
    repeats: usize,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let options = Options {
        repeats: arguments.repeats,
        ..Options::default()
    };
    let mut failure = None;
    let report = report::run_all(
        &mut || arguments.device.open(),
        arguments.filter.as_deref(),
        options,
        &mut |result| {
            if !arguments.json && failure.is_none() {
                failure = writeln!(std::io::stdout(), "{}", result.line()).err();
            }
        },
    )?;
    if let Some(error) = failure {
        return Err(error.into());
    }
    if arguments.json {
        super::print_json(&report)?;
    } else {
        write!(std::io::stdout(), "\n{}", report.table())?;
    }
    if !report.not_reached.is_empty() && !arguments.json {
        let mut stdout = std::io::stdout();
        writeln!(stdout, "\nnot reached:")?;
        for name in &report.not_reached {
            writeln!(stdout, "never {name}")?;
        }
    }
    if report.cases.is_empty() {
        bail!(
            "no case's name contains `{}`",
            arguments.filter.as_deref().unwrap_or_default()
        );
    }
    if let (Some(last), false) = (report.cases.last(), report.not_reached.is_empty()) {
        bail!(
            "the device was lost in {}, and {} cases were not reached; --filter runs a part of the list in a process of its own",
            last.name,
            report.not_reached.len()
        );
    }
    if !report.holds() {
        bail!(
            "{} of {} cases failed on {}",
            report.failed,
            report.cases.len(),
            report.device.name
        );
    }
    Ok(())
}
