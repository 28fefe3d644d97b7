//! `kimi-linear bench`: how fast things are, beside what this machine could do.

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

/// Options of `bench`.
#[derive(Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "For a first look: `kimi-linear bench --shape tiny`, or `kimi-linear bench model` for the demo model."
)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    what: Option<What>,
    #[command(flatten)]
    shape: shape::Arguments,
}

#[derive(Subcommand)]
enum What {
    /// Time single kernels and operations at a shape's sizes, beside their floors, and say how exact they are.
    Kernels(kernels::Arguments),
    /// Time a checkpoint as llama-bench does: prompts (pp512) and generated tokens (tg128), at a depth, repeated.
    Model(throughput::Arguments),
    /// Run the recurrence when told to on stdin, in turns with another implementation of it.
    Interleaved(interleaved::Arguments),
    /// Put a server under load: requests come when they come, whether or not the ones before are answered.
    #[cfg(feature = "server")]
    Serve(serve::Arguments),
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    match &arguments.what {
        Some(What::Kernels(arguments)) => kernels::run(arguments),
        Some(What::Model(arguments)) => throughput::run(arguments),
        Some(What::Interleaved(arguments)) => interleaved::run(arguments),
        #[cfg(feature = "server")]
        Some(What::Serve(arguments)) => serve::run(arguments),
        None => shape::run(&arguments.shape),
    }
}
