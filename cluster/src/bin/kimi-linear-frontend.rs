//! `kimi-linear-frontend`: an HTTP server in front of a cluster's workers.

use clap::Parser;
use kimi_linear_cluster::frontend::{self, Options};

fn main() -> anyhow::Result<()> {
    frontend::run(Options::parse())
}
