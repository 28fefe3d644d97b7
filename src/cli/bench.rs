//! `kimi-linear bench`: how fast things are, beside what this machine could do.

#[cfg(feature = "server")]
mod client;
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
mod turns;

use std::path::Path;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use kimi_linear::config::ModelConfig;

/// Options of `bench`.
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
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
    /// Run the recurrence when told to on stdin, in turns with another implementation of it.
    Turns(turns::Arguments),
    /// Put a server under load: requests come when they come, whether or not the ones before are answered.
    #[cfg(feature = "server")]
    Serve(serve::Arguments),
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    match &arguments.what {
        Some(What::Kernels(arguments)) => kernels::run(arguments),
        Some(What::Turns(arguments)) => turns::run(arguments),
        #[cfg(feature = "server")]
        Some(What::Serve(arguments)) => serve::run(arguments),
        None => shape::run(&arguments.shape),
    }
}

/// A shape by its name, or that of a model's folder or `config.json`.
fn config_of(shape: &str) -> Result<ModelConfig> {
    match shape {
        "48b" => Ok(ModelConfig::published()?),
        "tiny" => Ok(ModelConfig::tiny()?),
        path => {
            let mut file = Path::new(path).to_owned();
            if file.is_dir() {
                file.push("config.json");
            }
            ModelConfig::from_file(&file)
                .with_context(|| format!("--shape {path}: neither 48b nor tiny nor a model"))
        }
    }
}
