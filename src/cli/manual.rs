//! `kimi-linear completions` and `kimi-linear man`: completion scripts and man pages, generated from the command line's definition.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::Cli;

/// Options of `completions`.
#[derive(Args)]
#[command(
    after_help = "Example:\n  kimi-linear completions bash >~/.local/share/bash-completion/completions/kimi-linear"
)]
pub(crate) struct Completions {
    /// Shell to write completions for.
    #[arg(value_enum)]
    shell: Shell,
}

/// Options of `man`.
#[derive(Args)]
#[command(after_help = "Example:\n  kimi-linear man . && man ./kimi-linear-serve.1")]
pub(crate) struct Manual {
    /// Folder to write to; it is created if it does not exist.
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,
}

/// Prints a shell's completions.
pub(crate) fn completions(arguments: &Completions) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(
        arguments.shell,
        &mut Cli::command(),
        "kimi-linear",
        &mut script,
    );
    Ok(std::io::stdout().write_all(&script)?)
}

/// Writes a page of the manual for the program and for each of its commands.
pub(crate) fn manual(arguments: &Manual) -> Result<()> {
    let folder = &arguments.folder;
    std::fs::create_dir_all(folder)
        .and_then(|()| clap_mangen::generate_to(Cli::command(), folder))
        .with_context(|| format!("cannot write the manual to {}", folder.display()))
}
