//! `kimi-linear devices`: what a model can run on.

use std::io::Write;

use anyhow::Result;
use clap::Args;
use kimi_linear::backend;

/// Options of `devices`.
#[derive(Args)]
pub(crate) struct Arguments {
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let devices = backend::devices();
    if arguments.json {
        return super::print_json(&serde_json::json!({ "devices": devices }));
    }
    let mut stdout = std::io::stdout().lock();
    for device in devices {
        let memory = device.memory_bytes.map_or_else(
            || "memory unknown".to_owned(),
            |bytes| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30)),
        );
        writeln!(
            stdout,
            "--backend {} --device {}   {}, {memory}, computes in {}, caches in {}",
            device.backend, device.index, device.name, device.precision, device.cache
        )?;
    }
    Ok(())
}
