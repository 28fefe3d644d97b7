//! The routed experts of some layers on the CPU: for a model that is larger than its device's memory.

use anyhow::{Context, Result, ensure};
use clap::Args;
use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::backend::{Backend, Device, Offload, Parallelism, host_memory};
use kimi_linear::checkpoint::Checkpoint;
use kimi_linear::config::ModelConfig;
use kimi_linear::engine::MemoryPlanner;

use super::options::DeviceOptions;

/// vLLM's fraction of the device's memory.
const PART: f64 = 0.9;

/// Where the routed experts are.
#[derive(Args, Clone, Copy)]
pub(crate) struct OffloadOptions {
    /// Keep the routed experts of the first N layers that have experts in the host's memory, where the CPU computes them, and the rest of
    /// the model on the device. With `auto` these are as few layers as --gpu-memory-utilization requires. Default: the whole model is on
    /// the device.
    #[arg(long, value_name = "N|auto", value_parser = parse_layers)]
    n_cpu_moe: Option<HostLayers>,
    /// Fraction of the device's memory to use for weights, caches and activations, by `serve` and by --n-cpu-moe auto.
    #[arg(long, value_name = "FRACTION", default_value_t = PART)]
    gpu_memory_utilization: f64,
}

impl Default for OffloadOptions {
    fn default() -> Self {
        Self {
            n_cpu_moe: None,
            gpu_memory_utilization: PART,
        }
    }
}

/// How many layers have their experts on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HostLayers {
    /// As few as fit.
    Auto,
    /// This number.
    First(usize),
}

fn parse_layers(text: &str) -> Result<HostLayers, String> {
    match text.trim() {
        "auto" => Ok(HostLayers::Auto),
        text => text
            .parse()
            .map(HostLayers::First)
            .map_err(|_| format!("`{text}` is neither a number of layers nor `auto`")),
    }
}

/// A device, which may share a model with the host.
pub(crate) struct Placed {
    pub(crate) backend: Box<dyn Backend>,
    /// Bytes of the weights that are on the host.
    pub(crate) host_bytes: u64,
}

impl OffloadOptions {
    /// What was asked for.
    pub(crate) fn layers(self) -> Option<HostLayers> {
        self.n_cpu_moe
    }

    /// Refuses what cannot be, before a device is opened. `several` says whether other processes compute for this one, or it for
    /// another.
    pub(crate) fn check(
        self,
        config: &ModelConfig,
        degrees: Parallelism,
        several: bool,
    ) -> Result<()> {
        let part = self.gpu_memory_utilization;
        ensure!(
            part > 0.0 && part <= 1.0,
            "--gpu-memory-utilization should be above 0 and at most 1, but is {part}"
        );
        let Some(layers) = self.n_cpu_moe else {
            return Ok(());
        };
        if let HostLayers::First(count) = layers {
            let most = config.moe_layers().count();
            ensure!(
                count <= most,
                "--n-cpu-moe {count}: the model has {most} layers with experts"
            );
        }
        ensure!(
            layers == HostLayers::First(0) || (degrees == Parallelism::SINGLE && !several),
            "--n-cpu-moe keeps experts on the CPU beside a single device: it goes with none of --tensor-parallel-size, \
             --expert-parallel-size, --pipeline-parallel-size and --nnodes"
        );
        Ok(())
    }

    /// The fraction of this memory that may be used.
    pub(crate) fn part(self, bytes: u64) -> u64 {
        (bytes as f64 * self.gpu_memory_utilization) as u64
    }

    /// The bytes of a device's memory that may be used, and are free; `None` if it does not report its memory.
    pub(crate) fn budget(self, device: &mut dyn Backend) -> Option<u64> {
        let allowed = device.device().memory_bytes.map(|bytes| self.part(bytes));
        allowed.into_iter().chain(device.free_memory()).min()
    }

    /// Opens a single device, and leaves the experts to the host that the flags say.
    pub(crate) fn open(
        self,
        device: &DeviceOptions,
        config: &ModelConfig,
        checkpoint: impl FnOnce() -> Result<Checkpoint>,
        planner: impl FnOnce(&Device) -> MemoryPlanner,
    ) -> Result<Placed> {
        self.check(config, Parallelism::SINGLE, false)?;
        self.place(device.open()?, config, checkpoint, planner)
    }

    /// Leaves the experts to the host that the flags say. `planner` has the engine's sizes on a device; its weights and budget are
    /// filled in.
    pub(crate) fn place(
        self,
        mut device: Box<dyn Backend>,
        config: &ModelConfig,
        checkpoint: impl FnOnce() -> Result<Checkpoint>,
        planner: impl FnOnce(&Device) -> MemoryPlanner,
    ) -> Result<Placed> {
        let whole = |backend| Placed {
            backend,
            host_bytes: 0,
        };
        let Some(layers) = self.n_cpu_moe.filter(|it| *it != HostLayers::First(0)) else {
            return Ok(whole(device));
        };
        if device.device().backend == "cpu" {
            tracing::warn!("--n-cpu-moe has no effect: the whole model is on the CPU");
            return Ok(whole(device));
        }
        let checkpoint = checkpoint()?;
        let experts = checkpoint.expert_bytes(config);
        let count = match layers {
            HostLayers::First(count) => count,
            HostLayers::Auto => {
                let planner = MemoryPlanner {
                    weights: checkpoint.total_bytes(),
                    ..planner(device.device())
                };
                self.fewest(&mut *device, planner, config, &experts)?
            }
        };
        let host_bytes = experts.iter().take(count).sum();
        if count == 0 {
            return Ok(whole(device));
        }
        if let Some(there) = host_memory().filter(|there| host_bytes > *there) {
            tracing::warn!(
                "the experts of {count} layers take {}, and this machine has {}: they will be read from the files again and again",
                gigabytes(host_bytes),
                gigabytes(there)
            );
        }
        tracing::info!(layers = count, bytes = host_bytes, "experts on the CPU");
        let host = Box::new(CpuBackend::new());
        let backend = Box::new(Offload::new(device, host, config, count)?);
        Ok(Placed {
            backend,
            host_bytes,
        })
    }

    /// The smallest number of layers on the host with which an engine fits on a device.
    pub(crate) fn fewest(
        self,
        device: &mut dyn Backend,
        planner: MemoryPlanner,
        config: &ModelConfig,
        experts: &[u64],
    ) -> Result<usize> {
        let Some(memory) = self.budget(device) else {
            let Device { backend, name, .. } = device.device();
            anyhow::bail!(
                "--n-cpu-moe auto: {backend} does not report the memory of {name}; give a number of layers (`kimi-linear inspect \
                 --n-cpu-moe N` prints what the device then holds)"
            );
        };
        let planner = MemoryPlanner {
            memory: Some(memory),
            ..planner
        };
        let count = planner.fewest_on_host(config, experts);
        count.context("--n-cpu-moe auto: with the experts of all layers on the CPU")
    }
}

fn gigabytes(bytes: u64) -> String {
    format!("{:.1} GB", bytes as f64 / 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kimi_linear::backend::dry::DryBackend;
    use kimi_linear::config::Dtype;
    use kimi_linear::engine::EngineSizes;

    fn options(layers: Option<HostLayers>, part: f64) -> OffloadOptions {
        OffloadOptions {
            n_cpu_moe: layers,
            gpu_memory_utilization: part,
        }
    }

    #[test]
    fn a_number_of_layers_or_auto() {
        assert_eq!(parse_layers("auto"), Ok(HostLayers::Auto));
        assert_eq!(parse_layers("0"), Ok(HostLayers::First(0)));
        assert_eq!(parse_layers("26"), Ok(HostLayers::First(26)));
        for text in ["", "-1", "all", "1.5"] {
            assert!(parse_layers(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let config = ModelConfig::published().unwrap();
        let refused = |layers, part, degrees, several| {
            let checked = options(layers, part).check(&config, degrees, several);
            checked.err().map(|error| error.to_string())
        };
        let (single, two) = (
            Parallelism::SINGLE,
            Parallelism {
                pipeline: 2,
                ..Parallelism::SINGLE
            },
        );
        let first = |count| Some(HostLayers::First(count));
        for (layers, degrees, several) in [
            (None, two, true),
            (first(0), two, true),
            (first(26), single, false),
            (Some(HostLayers::Auto), single, false),
        ] {
            assert_eq!(refused(layers, 0.9, degrees, several), None);
        }
        let message = refused(first(27), 0.9, single, false).unwrap();
        assert_eq!(
            message,
            "--n-cpu-moe 27: the model has 26 layers with experts"
        );
        for (degrees, several) in [(two, false), (single, true)] {
            let message = refused(Some(HostLayers::Auto), 0.9, degrees, several).unwrap();
            assert!(message.contains("beside a single device"), "{message}");
        }
        for part in [0.0, 1.5, f64::NAN] {
            let message = refused(None, part, single, false).unwrap();
            assert!(message.contains("above 0 and at most 1"), "{message}");
        }
    }

    #[test]
    fn a_device_that_does_not_report_its_memory_needs_a_number() {
        let config = ModelConfig::published().unwrap();
        let planner = MemoryPlanner::of(&EngineSizes::one(1024), Dtype::Bf16);
        let auto = options(Some(HostLayers::Auto), 0.9);
        let mut device = DryBackend::new();
        let error = auto.fewest(&mut device, planner, &config, &[]).unwrap_err();
        assert!(error.to_string().contains("does not report"), "{error}");
    }
}
