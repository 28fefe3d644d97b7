//! `kimi-linear devices`: the devices, and the source of a CUDA device's kernels.

use std::io::Write;

use anyhow::Result;
use clap::Args;
use kimi_linear::backend::{self, Device};
use serde_json::{Value, json};

/// Options of `devices`.
#[derive(Args)]
pub(crate) struct Arguments {
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

/// The source of a CUDA device's kernels, or why it cannot be used; `None` for other backends, whose kernels are in the program.
#[cfg(feature = "cuda")]
fn kernels(device: &Device) -> Option<Result<backend::cuda::driver::Found, String>> {
    let found = || backend::cuda::driver::kernels_of(device.index);
    (device.backend == "cuda").then(|| found().map_err(|error| error.to_string()))
}

/// One device as JSON.
fn described(device: &Device) -> Result<Value> {
    #[cfg_attr(not(feature = "cuda"), expect(unused_mut, reason = "nothing is added"))]
    let mut value = serde_json::to_value(device)?;
    #[cfg(feature = "cuda")]
    match kernels(device) {
        Some(Ok(found)) => value["kernels"] = serde_json::to_value(found)?,
        Some(Err(error)) => value["error"] = error.into(),
        None => {}
    }
    Ok(value)
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let devices = backend::devices();
    if arguments.json {
        let devices: Vec<Value> = devices.iter().map(described).collect::<Result<_>>()?;
        return super::print_json(&json!({ "devices": devices }));
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
        #[cfg(feature = "cuda")]
        match kernels(&device) {
            Some(Ok(found)) => writeln!(stdout, "    kernels: {found}")?,
            Some(Err(error)) => writeln!(stdout, "    {error}")?,
            None => {}
        }
    }
    Ok(())
}
