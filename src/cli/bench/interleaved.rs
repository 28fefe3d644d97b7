//! `kimi-linear bench interleaved`: the recurrence, run by commands on stdin; each is answered by a line of JSON on stdout.

use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::builder::RangedU64ValueParser;
use clap::{Args, ValueEnum};
use kimi_linear::bench::interleaved::{Interleaved, Options};
use kimi_linear::conformance::Gates;
use kimi_linear::conformance::floors::Rates;
use serde_json::{Value, json};

use super::super::options::{DeviceOptions, parse_tokens};

/// How fast a state decays.
#[derive(Clone, Copy, ValueEnum)]
enum GateKind {
    /// As in a freshly initialised model: states decay within tens of tokens.
    Fresh,
    /// States decay over many thousands of tokens.
    Slow,
}

/// Options of `bench interleaved`.
#[derive(Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    device: DeviceOptions,
    /// Write the inputs to this file: q, k, v [T, H, K] BF16, not normalised; g [T, H, K] (log decay) and beta [T, H] F32; cu_seqlens;
    /// with --decode also initial [N, H, K, V] F32.
    #[arg(long, value_name = "OUT.safetensors")]
    inputs: PathBuf,
    /// Number of heads.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    heads: usize,
    /// Width of a key and of a value, in elements.
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    width: usize,
    /// Total number of prompt tokens.
    #[arg(long, value_name = "N", default_value = "8K", value_parser = parse_tokens)]
    tokens: usize,
    /// Number of sequences, of equal length.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    sequences: usize,
    /// Run one token per sequence from an initial state, instead of prompts.
    #[arg(long, conflicts_with = "tokens")]
    decode: bool,
    /// How fast states decay.
    #[arg(long, value_enum, default_value = "fresh")]
    gates: GateKind,
}

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let each = if arguments.decode {
        1
    } else {
        arguments.tokens / arguments.sequences
    };
    if !arguments.decode && each < 2 {
        bail!(
            "--tokens {} in --sequences {}: a prompt has two tokens at the least",
            arguments.tokens,
            arguments.sequences
        );
    }
    let options = Options {
        heads: arguments.heads,
        width: arguments.width,
        lengths: vec![each; arguments.sequences],
        gates: match arguments.gates {
            GateKind::Fresh => Gates::Init,
            GateKind::Slow => Gates::Frozen,
        },
    };
    let mut runs = Interleaved::new(arguments.device.open()?, &options)?;
    runs.write_inputs(&arguments.inputs)?;
    let (device, work) = (runs.device().clone(), runs.work());
    let floor = Rates::of(&device.name).map(|rates| work.floor(&rates).0);
    answer(&json!({
        "device": device,
        "bytes": work.bytes,
        "flops": work.flops,
        "floor_seconds": floor,
    }))?;
    for line in std::io::stdin().lock().lines() {
        let line = line.context("cannot read stdin")?;
        let mut words = line.split_whitespace();
        match (words.next(), words.next()) {
            (None, _) => {}
            (Some("quit"), _) => break,
            (Some("run"), count) => {
                let count = count.unwrap_or("1");
                let count = count
                    .parse()
                    .with_context(|| format!("run {count}: not a number"))?;
                answer(&json!({ "seconds": runs.run(count)? }))?;
            }
            (Some("errors"), None) => answer(&json!(runs.errors()?))?,
            (Some("errors"), Some(file)) => {
                answer(&json!(runs.errors_of(Path::new(file))?))?;
            }
            _ => bail!("`{line}`: expected run N, errors, errors FILE or quit"),
        }
    }
    Ok(())
}

/// A line that the steering process waits for.
fn answer(value: &Value) -> Result<()> {
    let mut stdout = std::io::stdout();
    writeln!(stdout, "{value}")?;
    stdout.flush()?;
    Ok(())
}
