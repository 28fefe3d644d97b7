//! `kimi-linear bench model`: a checkpoint's tokens per second, in the columns of llama-bench.

use std::io::Write;

use anyhow::{Result, ensure};
use clap::builder::RangedU64ValueParser;
use clap::{Args, ValueEnum};
use kimi_linear::backend::Device;
use kimi_linear::bench::throughput::{Test, Throughput, limits, measure};
use kimi_linear::engine::{EngineSizes, MemoryPlanner};
use serde::Serialize;

use super::super::nodes::NodeOptions;
use super::super::offload::OffloadOptions;
use super::super::options::{
    CacheOptions, DeviceOptions, ModelOptions, WeightOptions, checkpoint, load_model,
    parse_token_limit, parse_tokens,
};
use super::super::parallel::ParallelOptions;
use super::super::progress::Progress;

/// How results are printed.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// A table in Markdown.
    Md,
    /// A JSON array with one object per test.
    Json,
}

/// Options of `bench model`.
#[derive(Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    weights: WeightOptions,
    #[command(flatten)]
    device: DeviceOptions,
    #[command(flatten)]
    parallel: ParallelOptions,
    #[command(flatten)]
    nodes: NodeOptions,
    #[command(flatten)]
    offload: OffloadOptions,
    #[command(flatten)]
    cache: CacheOptions,
    /// Prompt lengths to time, in tokens; 0 for none.
    #[arg(short = 'p', long, value_name = "N,..", value_delimiter = ',', default_value = "512", value_parser = parse_token_limit)]
    prompt: Vec<usize>,
    /// Numbers of generated tokens to time; 0 for none.
    #[arg(short = 'n', long, value_name = "N,..", value_delimiter = ',', default_value = "128", value_parser = parse_token_limit)]
    generate: Vec<usize>,
    /// Context lengths at which each test begins, in tokens; filling the context is not timed.
    #[arg(short = 'd', long, value_name = "N,..", value_delimiter = ',', default_value = "0", value_parser = parse_token_limit)]
    depth: Vec<usize>,
    /// Number of timed runs per test, after one warm-up run.
    #[arg(short = 'r', long, value_name = "N", default_value_t = 5, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    repetitions: usize,
    /// Maximum prompt tokens per step.
    #[arg(long, value_name = "N", default_value = "512", value_parser = parse_tokens)]
    prefill_chunk: usize,
    /// Output format.
    #[arg(
        short = 'o',
        long,
        value_enum,
        value_name = "FORMAT",
        default_value = "md"
    )]
    output: Output,
    /// Print JSON: the same as `-o json`.
    #[arg(long, conflicts_with = "output")]
    json: bool,
}

/// One line of the table.
#[derive(Serialize)]
struct Row {
    model: String,
    /// Bytes of the weights.
    size: u64,
    params: u64,
    backend: &'static str,
    device: String,
    /// Threads of the CPU backend.
    threads: usize,
    test: String,
    #[serde(flatten)]
    result: Throughput,
    median: f64,
    deviation: f64,
}

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let config = arguments.model.config()?;
    let tests = Test::all(&arguments.prompt, &arguments.generate, &arguments.depth);
    ensure!(
        !tests.is_empty(),
        "nothing to time: expected a size above 0 in -p or -n"
    );
    let longest = Test::longest(&tests);
    ensure!(
        longest <= config.model_max_length,
        "{longest} tokens (depth and test): expected at most the model's {}",
        config.model_max_length
    );
    let (device, nodes) = (&arguments.device, &arguments.nodes);
    let degrees = arguments.parallel.degrees();
    let several = nodes.are_several() || nodes.is_headless();
    arguments.offload.check(&config, degrees, several)?;
    let stored = checkpoint(&arguments.model, arguments.weights, &config)?;
    if nodes.is_headless() {
        return nodes.serve(device, &config, &stored, degrees);
    }
    let size = stored.total_bytes();
    let stored = || Ok(stored.clone());
    let backend = arguments.parallel.open(device, nodes, &config, stored)?;
    let backend = arguments
        .offload
        .place(backend, &config, stored, |device| {
            planner(&tests, arguments, device)
        })?;
    let mut loaded = load_model(
        &arguments.model,
        arguments.weights,
        &config,
        backend.backend,
        |device| {
            limits(
                &tests,
                arguments.prefill_chunk,
                arguments.cache.dtype(device),
            )
        },
    )?;
    let progress = Progress::count("timing", tests.len());
    let mut rows = Vec::with_capacity(tests.len());
    for (done, test) in tests.into_iter().enumerate() {
        progress.set(done as u64);
        let result = measure(&mut loaded.model, test, arguments.repetitions)?;
        rows.push(Row {
            model: arguments.model.name(),
            size,
            params: config
                .tensors()
                .iter()
                .map(|tensor| tensor.elements())
                .sum(),
            backend: loaded.device.backend,
            device: loaded.device.name.clone(),
            threads: rayon::current_num_threads(),
            test: test.to_string(),
            median: result.median(),
            deviation: result.deviation(),
            result,
        });
    }
    progress.finish();
    let output = match arguments.json {
        true => Output::Json,
        false => arguments.output,
    };
    match output {
        Output::Json => super::super::print_json(&rows),
        Output::Md => Ok(write!(std::io::stdout(), "{}", markdown(&rows))?),
    }
}

/// The planner of what the tests need on a device: a sequence, and its state at the depth.
fn planner(tests: &[Test], arguments: &Arguments, device: &Device) -> MemoryPlanner {
    let longest = Test::longest(tests);
    let sizes = EngineSizes {
        prefill_chunk: arguments.prefill_chunk.min(longest),
        checkpoints: 1,
        ..EngineSizes::one(longest)
    };
    MemoryPlanner::of(&sizes, arguments.cache.dtype(device))
}

/// The columns of llama-bench; `t/s` is the median and the standard deviation of the repetitions.
fn markdown(rows: &[Row]) -> String {
    let mut text = "| model | size | params | backend | threads | test | t/s |\n\
                    |---|---:|---:|---|---:|---:|---:|\n"
        .to_owned();
    for row in rows {
        let (size, params) = (
            row.size as f64 / (1_u64 << 30) as f64,
            row.params as f64 / 1e9,
        );
        text.push_str(&format!(
            "| {} | {size:.2} GiB | {params:.2} B | {} | {} | {} | {:.2} ± {:.2} |\n",
            row.model, row.backend, row.threads, row.test, row.median, row.deviation
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_a_line_for_each_test() {
        let result = Throughput {
            test: Test::all(&[], &[8], &[0])[0],
            samples: vec![10.0, 12.0],
        };
        let row = Row {
            model: "demo".to_owned(),
            size: 3 << 29,
            params: 1_250_000_000,
            backend: "cpu",
            device: "a CPU".to_owned(),
            threads: 2,
            test: result.test.to_string(),
            median: result.median(),
            deviation: result.deviation(),
            result,
        };
        let table = markdown(&[row]);
        assert_eq!(
            table.lines().last(),
            Some("| demo | 1.50 GiB | 1.25 B | cpu | 2 | tg8 | 12.00 ± 1.41 |")
        );
        assert_eq!(table.lines().count(), 3);
    }

    #[test]
    fn no_tokens_are_a_count_too() {
        assert_eq!(parse_token_limit("0"), Ok(0));
        assert_eq!(parse_token_limit("4K"), Ok(4096));
        assert!(parse_token_limit("-1").is_err());
    }
}
