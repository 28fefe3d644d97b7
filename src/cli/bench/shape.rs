//! `kimi-linear bench --shape`: a model's shape with random weights generated on the device.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;
use clap::builder::RangedU64ValueParser;
use kimi_linear::bench::Effort;
use kimi_linear::bench::profile::{TOKENS, profile};
use kimi_linear::bench::report;
use kimi_linear::bench::shape::{Options, Row, Tell, Work, measure};
use kimi_linear::config::ModelConfig;
use kimi_linear_plan::profile::{Decode, Point, Profile};

use super::super::options::{CacheOptions, DeviceOptions, parse_tokens};
use super::super::progress::Progress;

/// Options of `bench --shape`.
#[derive(Args)]
pub(super) struct Arguments {
    /// Shape to measure: 48b (the published model), tiny (a quick trial), or the path of a model's folder, config.json or GGUF. Weights
    /// and caches are random numbers generated on the device; no weights are read. Required, except with --profile.
    #[arg(long, value_name = "SHAPE")]
    shape: Option<String>,
    /// Write a profile of this device for `plan`: prefill seconds and cache bytes of prompts of 1K, 8K, 32K and 128K tokens (or those of
    /// --prefill; on a CPU the longer ones take very long), and the seconds of a decode step. The default shape is 48b.
    #[arg(long, value_name = "OUT.json", conflicts_with_all = ["compare", "context", "batch", "dry_run"])]
    profile: Option<PathBuf>,
    /// With --profile: number of sequences in the decode step.
    #[arg(long, value_name = "N", default_value_t = 20, requires = "profile", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    slots: usize,
    #[command(flatten)]
    device: DeviceOptions,
    #[command(flatten)]
    cache: CacheOptions,
    /// Measure only the first N layers.
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    layers: Option<usize>,
    /// Replace every KDA layer by an MLA layer.
    #[arg(long, conflicts_with = "compare")]
    mla_only: bool,
    /// Measure both the hybrid shape and its all-MLA version, and print the ratio beside the one that their bytes predict.
    #[arg(long)]
    compare: bool,
    /// Context lengths to decode at, such as 4K,128K,512K,1M; caches are filled with random numbers, not prefilled. Default: 4K; with
    /// --compare 4K,128K,512K,1M; with --prefill none.
    #[arg(long, value_name = "N,..", value_delimiter = ',', value_parser = parse_tokens)]
    context: Vec<usize>,
    /// Batch sizes to decode with, in sequences.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "1", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    batch: Vec<usize>,
    /// Prompt lengths to prefill, in tokens.
    #[arg(long, value_name = "N,..", value_delimiter = ',', value_parser = parse_tokens)]
    prefill: Vec<usize>,
    /// Maximum prompt tokens per step.
    #[arg(long, value_name = "N", default_value = "8K", value_parser = parse_tokens)]
    prefill_chunk: usize,
    /// Measure one layer of each kind and multiply by the number of layers. This is automatic if the layers do not fit on the device.
    #[arg(long)]
    by_layer: bool,
    /// Random seed of weights and caches.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u32,
    /// Run everything once without timing it.
    #[arg(long)]
    dry_run: bool,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

impl Arguments {
    fn options(&self) -> Options {
        Options {
            seed: self.seed,
            prefill_chunk: self.prefill_chunk,
            by_layer: self.by_layer,
            cache: self.cache.named(),
            effort: (!self.dry_run).then(Effort::default),
        }
    }
}

/// Shows the progress of the measurements.
#[derive(Default)]
struct Reporter {
    bar: Option<Progress>,
}

impl Reporter {
    fn hear(&mut self, tell: Tell<'_>) {
        match tell {
            Tell::Making(bytes) => self.bar = Some(Progress::bytes("making", bytes)),
            Tell::Made(bytes) => self.bar.iter().for_each(|bar| bar.set(bytes)),
            Tell::Measuring(what) => {
                self.bar.iter().for_each(Progress::finish);
                self.bar = None;
                tracing::info!(what, "measuring");
            }
        }
    }
}

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    ensure!(
        arguments.shape.is_some() || arguments.profile.is_some(),
        "nothing to measure: use `bench --shape tiny` for a quick trial, `bench --shape 48b` for the published shape, `bench model` for a \
         checkpoint, `bench kernels` for single kernels, or `bench serve` for a running server"
    );
    let shape = arguments.shape.as_deref().unwrap_or("48b");
    let mut config = super::super::options::config_of(shape)?;
    if let Some(layers) = arguments.layers {
        ensure!(
            layers <= config.num_hidden_layers,
            "--layers {layers}: this shape has {}",
            config.num_hidden_layers
        );
        config = config.first_layers(layers);
    }
    if let Some(file) = &arguments.profile {
        return run_profile(arguments, shape, config, file);
    }
    let configs = match (arguments.compare, arguments.mla_only) {
        (true, _) => vec![config.clone(), config.mla_only()],
        (_, true) => vec![config.mla_only()],
        _ => vec![config],
    };
    let mut contexts = arguments.context.clone();
    if contexts.is_empty() && arguments.prefill.is_empty() {
        contexts.push(4 << 10);
        if arguments.compare {
            contexts.extend([128 << 10, 512 << 10, 1 << 20]);
        }
    }
    let mut list = Vec::new();
    for &context in &contexts {
        for &batch in &arguments.batch {
            list.push(Work::Decode { context, batch });
        }
    }
    for &tokens in &arguments.prefill {
        list.push(Work::Prefill { tokens });
    }
    let options = arguments.options();
    let mut rows: Vec<Row> = Vec::new();
    for work in &list {
        for config in &configs {
            let mut reporter = Reporter::default();
            let row = measure(
                &mut || arguments.device.open(),
                config,
                work,
                &options,
                &mut |tell| reporter.hear(tell),
            )?;
            rows.push(row);
        }
    }
    let device = arguments.device.open()?.device().clone();
    if arguments.json {
        let all = serde_json::json!({
            "device": device,
            "timings": !arguments.dry_run,
            "rows": rows,
        });
        return super::super::print_json(&all);
    }
    let mut stdout = std::io::stdout();
    writeln!(stdout, "{}: {}\n", device.backend, device.name)?;
    write!(stdout, "{}", report::shape(&rows))?;
    Ok(())
}

/// Measures a profile and writes it.
fn run_profile(arguments: &Arguments, shape: &str, config: ModelConfig, file: &Path) -> Result<()> {
    let config = if arguments.mla_only {
        config.mla_only()
    } else {
        config
    };
    let tokens = match &arguments.prefill[..] {
        [] => &TOKENS[..],
        given => given,
    };
    let mut reporter = Reporter::default();
    let measured = profile(
        &mut || arguments.device.open(),
        &config,
        tokens,
        arguments.slots,
        &arguments.options(),
        &mut |tell| reporter.hear(tell),
    )?;
    let device = arguments.device.open()?.device().clone();
    let points = measured.prompts.iter().map(|prompt| Point {
        tokens: prompt.tokens as u64,
        bytes: prompt.bytes,
        seconds: prompt.seconds,
    });
    let name = file.file_stem().unwrap_or(file.as_os_str());
    let source = format!(
        "measured by kimi-linear {} bench --profile: shape {shape}, {} KDA and {} MLA layers, random weights, on {} ({})",
        env!("CARGO_PKG_VERSION"),
        config.kda_layers().count(),
        config.mla_layers().count(),
        device.name,
        device.backend,
    );
    let decode = Decode {
        slots: u32::try_from(measured.slots)?,
        step_seconds: measured.step_seconds,
    };
    let profile = Profile::new(name.to_string_lossy(), source, 1, points.collect(), decode)?;
    let mut text = serde_json::to_string_pretty(&profile)?;
    text.push('\n');
    std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))?;
    if arguments.json {
        return super::super::print_json(&profile);
    }
    let mut stdout = std::io::stdout();
    writeln!(
        stdout,
        "{}\n\n| tokens | cache, bytes | prefill, s | cache made, Gbit/s |\n|---:|---:|---:|---:|",
        profile.source()
    )?;
    for point in profile.points() {
        let gbit = profile.kv_bits_per_second(point.tokens as f64) / 1e9;
        writeln!(
            stdout,
            "| {} | {} | {:.4} | {gbit:.4} |",
            point.tokens, point.bytes, point.seconds
        )?;
    }
    writeln!(
        stdout,
        "\nA decode step of {} sequences: {:.4} s.",
        decode.slots, decode.step_seconds
    )?;
    Ok(())
}
