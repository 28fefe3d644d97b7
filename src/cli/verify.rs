//! `kimi-linear verify`: reads every weight once and counts NaN and infinite values, by format.

use std::collections::BTreeMap;
use std::io::Write;

use anyhow::{Result, bail};
use clap::Args;
use serde::Serialize;

use super::options::ModelOptions;
use super::progress::Progress;

/// Options of `verify`.
#[derive(Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    model: ModelOptions,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    tensors: usize,
    bytes: u64,
    formats: Vec<Format>,
    /// Each tensor with non-finite values.
    damaged: Vec<Damaged>,
}

#[derive(Serialize)]
struct Format {
    format: String,
    tensors: usize,
    weights: u64,
    non_finite: u64,
}

#[derive(Serialize)]
struct Damaged {
    tensor: String,
    format: String,
    non_finite: usize,
    /// The flat index of the first one.
    first: usize,
    value: String,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let files = arguments.model.files()?;
    let checkpoint = files.checkpoint(&files.config()?)?;
    let progress = Progress::bytes("reading", checkpoint.total_bytes());
    let mut formats: BTreeMap<String, Format> = BTreeMap::new();
    let (mut damaged, mut done) = (Vec::new(), 0);
    for tensor in checkpoint.tensors() {
        let tensor = tensor?;
        let name = tensor.format.to_string();
        let non_finite = tensor.non_finite();
        let format = formats.entry(name.clone()).or_insert_with(|| Format {
            format: name.clone(),
            tensors: 0,
            weights: 0,
            non_finite: 0,
        });
        format.tensors += 1;
        format.weights += tensor.elements() as u64;
        format.non_finite += non_finite as u64;
        if let Some((first, value)) = tensor.first_non_finite() {
            damaged.push(Damaged {
                tensor: tensor.name.clone(),
                format: name,
                non_finite,
                first,
                value: value.to_string(),
            });
        }
        done += tensor.bytes.len() as u64;
        progress.set(done);
    }
    progress.finish();
    let report = Report {
        tensors: checkpoint.len(),
        bytes: checkpoint.total_bytes(),
        formats: formats.into_values().collect(),
        damaged,
    };
    if arguments.json {
        super::print_json(&report)?;
    } else {
        print(&report)?;
    }
    match report.damaged.len() {
        0 => Ok(()),
        damaged => bail!("NaN or infinite values in {damaged} tensor(s)"),
    }
}

fn print(report: &Report) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{:<8} {:>8} {:>15} {:>12}",
        "format", "tensors", "weights", "not finite"
    )?;
    for format in &report.formats {
        let Format {
            format,
            tensors,
            weights,
            non_finite,
        } = format;
        writeln!(
            out,
            "{format:<8} {tensors:>8} {weights:>15} {non_finite:>12}"
        )?;
    }
    for tensor in &report.damaged {
        let Damaged {
            tensor,
            format,
            non_finite,
            first,
            value,
        } = tensor;
        writeln!(
            out,
            "{tensor} ({format}): {non_finite}, the first {value} at element {first}"
        )?;
    }
    Ok(())
}
