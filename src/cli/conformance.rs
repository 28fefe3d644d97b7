//! `kimi-linear conformance`: tests that this machine's devices and drivers compute correct results.

use std::io::Write;

use anyhow::{Result, bail};
use clap::Args;
use kimi_linear::conformance::report::Report;
use kimi_linear::conformance::{Case, Options, Verdict, cases, report};

use super::counted;
use super::options::DeviceOptions;
use super::progress::Progress;

/// Options of `conformance`.
#[derive(Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    device: DeviceOptions,
    /// Run only cases whose name contains TEXT, such as `kda_chunk` or `mla`.
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// Number of runs of an operation whose results must be identical to the bit.
    #[arg(long, value_name = "N", default_value_t = Options::default().repeats)]
    repeats: usize,
    /// Print a line for every case, not only for failed ones.
    #[arg(short, long)]
    verbose: bool,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let options = Options {
        repeats: arguments.repeats,
        ..Options::default()
    };
    let filter = arguments.filter.as_deref();
    let wanted = |case: &&Case| filter.is_none_or(|filter| case.name.contains(filter));
    let wanted = cases().iter().filter(wanted).count();
    if wanted == 0 {
        bail!("no case's name contains `{}`", filter.unwrap_or_default());
    }
    let progress = Progress::count("checking", wanted);
    let (mut failure, mut done) = (None, 0);
    let report = report::run_all(
        &mut || arguments.device.open(),
        filter,
        options,
        &mut |result| {
            done += 1;
            progress.set(done);
            let shown = arguments.verbose
                || matches!(result.outcome.verdict, Verdict::Failed | Verdict::Lost);
            if shown && !arguments.json && failure.is_none() {
                let print = || writeln!(std::io::stdout(), "{}", result.line());
                failure = progress.beside(print).err();
            }
        },
    )?;
    progress.finish();
    if let Some(error) = failure {
        return Err(error.into());
    }
    if arguments.json {
        super::print_json(&report)?;
    } else {
        print(&report)?;
    }
    judge(&report, arguments.json)
}

/// The table, and what was not reached.
fn print(report: &Report) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    write!(stdout, "\n{}", report.table())?;
    if !report.not_reached.is_empty() {
        writeln!(stdout, "\nnot reached:")?;
        for name in &report.not_reached {
            writeln!(stdout, "never {name}")?;
        }
    }
    Ok(())
}

/// The verdict: a last line, or an error.
fn judge(report: &Report, json: bool) -> Result<()> {
    if let (Some(last), false) = (report.cases.last(), report.not_reached.is_empty()) {
        bail!(
            "the device was lost in {}, and {} cases were not reached; --filter runs a part of the list in a process of its own",
            last.name,
            report.not_reached.len()
        );
    }
    let (cases, device) = (report.cases.len(), &report.device);
    if !report.holds() {
        bail!(
            "{} of {cases} cases failed on {}",
            report.failed,
            device.name
        );
    }
    if !json {
        let skipped = match report.skipped {
            0 => String::new(),
            skipped => format!(", {skipped} skipped (this backend does not have what they test)"),
        };
        let cases = counted(cases, "case");
        let (backend, name) = (device.backend, &device.name);
        writeln!(
            std::io::stdout(),
            "\n{cases}{skipped}, none failed: {backend} on {name} computes what it should."
        )?;
    }
    Ok(())
}
