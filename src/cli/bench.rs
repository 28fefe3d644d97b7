//! `kimi-linear bench`: speed, beside what this machine's bandwidth and arithmetic allow.

mod burst;
#[cfg(feature = "server")]
mod client;
mod interleaved;
mod kernels;
#[cfg(feature = "server")]
mod load;
#[cfg(feature = "server")]
mod plot;
#[cfg(feature = "server")]
mod report;
#[cfg(feature = "server")]
mod serve;
mod shape;
mod throughput;

use anyhow::Result;
use clap::{Args, Subcommand};

const AFTER_HELP: &str = "\
Examples:
  kimi-linear bench --shape tiny                      a quick trial of a random model
  kimi-linear bench --shape 48b --context 4K,128K     decode speed of the published shape with random weights
  kimi-linear bench model --model Kimi-Linear         a checkpoint (without --model: the demo model)
  kimi-linear bench kernels --shape tiny --small      single kernels and operations
  kimi-linear bench serve --request-rate 4            load on a running `kimi-linear serve`
  kimi-linear bench burst --memory-mib 24 --request-rate 8   two replicas in a burst, with and without dropping experts

The floor of a measurement is the time that its arithmetic, or reading its data from memory once, takes at the device's measured rates;
a kernel whose data is still in a cache can be faster. `-` is a floor that is not known.";

/// Options of `bench`.
#[derive(Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = AFTER_HELP
)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    what: Option<What>,
    #[command(flatten)]
    shape: shape::Arguments,
}

#[derive(Subcommand)]
enum What {
    /// Time single kernels and operations beside their floors, and check their results.
    Kernels(kernels::Arguments),
    /// Time a checkpoint as llama-bench does: prompt processing (pp512) and token generation (tg128).
    Model(throughput::Arguments),
    /// Time the KDA recurrence on commands from stdin, to alternate with another implementation in one benchmark.
    ///
    /// Commands, one per line: `run N` runs N times and prints the seconds; `errors` compares the last run with an f64 recurrence; `errors
    /// FILE` compares results in a safetensors file (`o` [T, H, V] and `state` [N, H, K, V], F32) with it; `quit` exits. Each answer is one
    /// line of JSON.
    Interleaved(interleaved::Arguments),
    /// Serve a burst of requests by several replicas in this process, with and without dropping parameters.
    Burst(burst::Arguments),
    /// Load-test an OpenAI-compatible server: requests are sent on schedule, whether or not earlier ones have finished.
    #[cfg(feature = "server")]
    Serve(serve::Arguments),
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    match &arguments.what {
        Some(What::Kernels(arguments)) => kernels::run(arguments),
        Some(What::Model(arguments)) => throughput::run(arguments),
        Some(What::Interleaved(arguments)) => interleaved::run(arguments),
        Some(What::Burst(arguments)) => burst::run(arguments),
        #[cfg(feature = "server")]
        Some(What::Serve(arguments)) => serve::run(arguments),
        None => shape::run(&arguments.shape),
    }
}
