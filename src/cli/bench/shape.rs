//! `kimi-linear bench --shape`: a model's shape with random weights that the device makes.

use std::io::Write;

use anyhow::{Result, ensure};
use clap::Args;
use clap::builder::RangedU64ValueParser;
use kimi_linear::bench::Effort;
use kimi_linear::bench::report;
use kimi_linear::bench::shape::{Options, Row, Tell, Work, measure};

use super::super::options::{DeviceOptions, parse_tokens};
use super::super::progress::Progress;

/// Options of `bench --shape`.
#[derive(Args)]
pub(super) struct Arguments {
    /// Measure a model of this shape: 48b (the published model), tiny (for trying this out), or a model's folder or config.json.
    /// Its weights and caches are random numbers that the device makes, so no weights are read.
    #[arg(long, value_name = "SHAPE", required = true)]
    shape: Option<String>,
    #[command(flatten)]
    device: DeviceOptions,
    /// Only so many of its layers, the first ones.
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    layers: Option<usize>,
    /// The same shape with latent attention in every layer.
    #[arg(long, conflicts_with = "compare")]
    mla_only: bool,
    /// Both, one held against the other, beside what their bytes allow.
    #[arg(long)]
    compare: bool,
    /// Decode over contexts of so many tokens, such as 4K,128K,512K,1M; they are there from the start, nothing is prefilled. By
    /// default 4K, or none where there are prompts.
    #[arg(long, value_name = "N,..", value_delimiter = ',', value_parser = parse_tokens)]
    context: Vec<usize>,
    /// Decode so many sequences at a time.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "1", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    batch: Vec<usize>,
    /// Prefill prompts of so many tokens.
    #[arg(long, value_name = "N,..", value_delimiter = ',', value_parser = parse_tokens)]
    prefill: Vec<usize>,
    /// The most tokens of a prompt in one step.
    #[arg(long, value_name = "N", default_value = "8K", value_parser = parse_tokens)]
    piece: usize,
    /// Measure one layer of each kind and multiply by their number. Done anyway where all layers do not fit the device.
    #[arg(long)]
    by_layer: bool,
    /// Seeds weights and caches.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u32,
    /// Run everything once and take no timings.
    #[arg(long)]
    dry_run: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let shape = arguments.shape.as_deref().unwrap_or("48b");
    let mut config = super::config_of(shape)?;
    if let Some(layers) = arguments.layers {
        ensure!(
            layers <= config.num_hidden_layers,
            "--layers {layers}: this shape has {}",
            config.num_hidden_layers
        );
        config = config.first_layers(layers);
    }
    let configs = match (arguments.compare, arguments.mla_only) {
        (true, _) => vec![config.clone(), config.mla_only()],
        (_, true) => vec![config.mla_only()],
        _ => vec![config],
    };
    let mut contexts = arguments.context.clone();
    if contexts.is_empty() && arguments.prefill.is_empty() {
        contexts.push(4 << 10);
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
    let options = Options {
        seed: arguments.seed,
        piece: arguments.piece,
        by_layer: arguments.by_layer,
        effort: (!arguments.dry_run).then(Effort::default),
    };
    let mut rows: Vec<Row> = Vec::new();
    for work in &list {
        for config in &configs {
            let mut bar: Option<Progress> = None;
            let row = measure(
                &mut || arguments.device.open(),
                config,
                work,
                &options,
                &mut |tell| match tell {
                    Tell::Making(bytes) => bar = Some(Progress::bytes("making", bytes)),
                    Tell::Made(bytes) => bar.iter().for_each(|bar| bar.set(bytes)),
                    Tell::Measuring(what) => {
                        bar.iter().for_each(Progress::finish);
                        bar = None;
                        tracing::info!(what, "measuring");
                    }
                },
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
