//! `kimi-linear-worker`: a worker of a cluster.

use clap::Parser;
use kimi_linear_cluster::worker::{self, Options};

fn main() -> anyhow::Result<()> {
    worker::run(Options::parse())
}
