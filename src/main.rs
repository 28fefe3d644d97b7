//! The `kimi-linear` program: one command, a subcommand for each thing to do.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::run()
}
