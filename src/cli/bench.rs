//! `kimi-linear bench`: how fast things are, beside what this machine could do.

#[cfg(feature = "server")]
mod client;
#[cfg(feature = "server")]
mod load;
#[cfg(feature = "server")]
mod plot;
#[cfg(feature = "server")]
mod report;
#[cfg(feature = "server")]
mod serve;

use std::io::Write;

use anyhow::Result;
use clap::{Args, Subcommand};
use kimi_linear::conformance::bench;

use super::options::DeviceOptions;

/// Options of `bench`.
#[derive(Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Time single operations at the published model's sizes, beside the device's measured copy and product rates.
    Ops(Ops),
    /// Put a server under load: requests come when they come, whether or not the ones before are answered.
    #[cfg(feature = "server")]
    Serve(serve::Arguments),
}

#[derive(Args)]
struct Ops {
    #[command(flatten)]
    device: DeviceOptions,
    /// Time only cases whose name contains this.
    #[arg(long, value_name = "S")]
    filter: Option<String>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    match &arguments.what {
        What::Ops(ops) => bench_ops(ops),
        #[cfg(feature = "server")]
        What::Serve(arguments) => serve::run(arguments),
    }
}

fn bench_ops(ops: &Ops) -> Result<()> {
    let mut failure = None;
    let report = bench::bench_ops(
        &mut || ops.device.open(),
        ops.filter.as_deref(),
        &mut |row| {
            if !ops.json && failure.is_none() {
                failure = writeln!(std::io::stdout(), "{}", row.line()).err();
            }
        },
    )?;
    if let Some(error) = failure {
        return Err(error.into());
    }
    if ops.json {
        return super::print_json(&report);
    }
    writeln!(
        std::io::stdout(),
        "\n{} on {}: copies {:.1} GB/s, multiplies {:.1} GFLOP/s",
        report.device.backend,
        report.device.name,
        report.copy_bytes_per_second / 1e9,
        report.product_flops_per_second / 1e9,
    )?;
    Ok(())
}
