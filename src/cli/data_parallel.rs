//! Several replicas of a model in one process.

use std::ops::ControlFlow;

use anyhow::{Result, ensure};
use clap::builder::RangedU64ValueParser;
use clap::{Args, ValueEnum};
use kimi_linear::backend::Backend;
use kimi_linear::config::ModelConfig;
use kimi_linear::data_parallel::{DataParallelOptions, LoadedReplicas, ParameterDrop};
use kimi_linear::llm::LlmFiles;

use super::offload::OffloadOptions;
use super::options::DeviceOptions;
use super::progress::Progress;

/// Replicas, and what they do in a burst.
#[derive(Args, Clone, Copy)]
pub(crate) struct ReplicaOptions {
    /// Number of replicas of the model in this process, each with a scheduler and a prefix cache of its own, on the devices with the
    /// numbers from 0, or those that --device lists. Requests go to the least loaded one; if its device fails, they go on at
    /// another.
    #[arg(long, visible_alias = "dp", value_name = "N", default_value_t = 1, value_parser = RangedU64ValueParser::<usize>::new().range(1..=64))]
    data_parallel_size: usize,
    /// What replicas drop when the caches of a burst do not fit, until it is over: all copies but one of the routed experts (`experts`; the
    /// bits of answers stay), or of the layers (`layers`; replicas become a pipeline). The memory is used for caches meanwhile.
    #[arg(long, value_name = "WHAT", value_enum, default_value = "none")]
    parameter_drop: DropName,
}

/// What is dropped.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DropName {
    /// Nothing.
    None,
    /// Routed experts.
    Experts,
    /// Layers.
    Layers,
}

impl DropName {
    pub(crate) fn form(self) -> ParameterDrop {
        match self {
            Self::None => ParameterDrop::None,
            Self::Experts => ParameterDrop::Experts,
            Self::Layers => ParameterDrop::Layers,
        }
    }
}

impl ReplicaOptions {
    /// Number of replicas.
    pub(crate) fn count(self) -> usize {
        self.data_parallel_size
    }

    /// What they drop.
    pub(crate) fn form(self) -> ParameterDrop {
        self.parameter_drop.form()
    }

    /// Refuses what cannot be, before a device is opened. `divided` are the flags, of those that were given, by which a replica would
    /// consist of several devices or processes.
    pub(crate) fn check(self, config: &ModelConfig, divided: &[&str]) -> Result<()> {
        self.form().check(config, self.data_parallel_size)?;
        ensure!(
            self.data_parallel_size == 1 || divided.is_empty(),
            "--data-parallel-size {} runs each replica on one device of this process: it does not go with {}",
            self.data_parallel_size,
            divided.join(" and ")
        );
        Ok(())
    }

    /// Opens a device for each replica.
    pub(crate) fn open(self, device: &DeviceOptions) -> Result<Vec<Box<dyn Backend>>> {
        Ok(device.open_ranks(self.data_parallel_size)?)
    }

    /// Bytes of each device that may be used; `None` if no device reports its memory. Replicas on the CPU share its memory.
    pub(crate) fn budget(
        self,
        flags: OffloadOptions,
        devices: &mut [Box<dyn Backend>],
    ) -> Option<u64> {
        let shared = devices.iter().all(|it| it.device().backend == "cpu");
        let share = if shared { devices.len() as u64 } else { 1 };
        let each = devices.iter_mut().map(|device| flags.budget(&mut **device));
        each.flatten().min().map(|bytes| bytes / share)
    }
}

/// Loads the replicas, under a progress bar.
pub(crate) fn load(
    files: LlmFiles,
    devices: Vec<Box<dyn Backend>>,
    options: &DataParallelOptions,
) -> Result<LoadedReplicas> {
    let mut progress = None;
    let loaded = files.load_replicas(devices, options, &mut |done, total| {
        let bar = progress.get_or_insert_with(|| Progress::bytes("loading", total));
        bar.set(done);
        ControlFlow::Continue(())
    })?;
    progress.iter().for_each(Progress::finish);
    let states = &loaded.states;
    if options.drop != ParameterDrop::None && states.dropped.is_empty() {
        tracing::warn!(
            "--parameter-drop {}: nothing will be dropped, since a replica would have less than an eighth more than its {} slots and {} blocks",
            options.drop.name(),
            states.whole.slots,
            states.whole.blocks
        );
    }
    Ok(loaded)
}
