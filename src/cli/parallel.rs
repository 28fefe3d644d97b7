//! Several devices for one model.

use anyhow::Result;
use clap::Args;
use clap::builder::RangedU64ValueParser;
use kimi_linear::backend::{self, Backend, Group, Parallelism};
use kimi_linear::checkpoint::Checkpoint;
use kimi_linear::config::{Dtype, ModelConfig};
use kimi_linear::error::BackendError;
use kimi_linear::model::{Footprint, Limits};

use super::nodes::NodeOptions;
use super::options::DeviceOptions;

/// How several devices divide the model.
#[derive(Args, Clone, Copy)]
pub(crate) struct ParallelOptions {
    /// Number of devices that divide heads, hidden units and vocabulary, with the devices' numbers from 0, or as --device lists
    /// them (`--device 0,2`; one named twice takes two parts). NVIDIA's GPUs exchange results with NCCL if it is installed; else results
    /// pass through the host's memory.
    #[arg(long, visible_alias = "tp", value_name = "N", default_value_t = 1, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    tensor_parallel_size: usize,
    /// Keep the routed experts whole: each of the --tensor-parallel-size devices has some of them, not a part of each.
    #[arg(long, conflicts_with = "expert_parallel_size")]
    enable_expert_parallel: bool,
    /// Number of devices that divide the routed experts while each has all of the rest: the bits of f32 results are those of one
    /// device.
    #[arg(long, visible_alias = "ep-size", value_name = "N", conflicts_with = "tensor_parallel_size", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    expert_parallel_size: Option<usize>,
    /// Number of stages, each of which has consecutive layers on devices of its own.
    #[arg(long, visible_alias = "pp", value_name = "N", default_value_t = 1, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pipeline_parallel_size: usize,
}

impl ParallelOptions {
    /// The degrees.
    pub(crate) fn degrees(self) -> Parallelism {
        let tensor = self.tensor_parallel_size;
        let whole = self.enable_expert_parallel.then_some(tensor);
        Parallelism {
            tensor,
            expert: self.expert_parallel_size.or(whole).unwrap_or(1),
            pipeline: self.pipeline_parallel_size,
        }
    }

    /// Opens the devices of this process for a model.
    pub(crate) fn open_here(
        self,
        device: &DeviceOptions,
        config: &ModelConfig,
    ) -> Result<Box<dyn Backend>> {
        let degrees = self.degrees();
        degrees.check(config)?;
        if degrees.ranks() == 1 {
            return Ok(device.open()?);
        }
        let devices = device.open_ranks(degrees.ranks())?;
        Ok(Box::new(Group::new(devices, degrees, config)?))
    }

    /// Opens the devices for a model, and waits for those of other nodes.
    pub(crate) fn open(
        self,
        device: &DeviceOptions,
        nodes: &NodeOptions,
        config: &ModelConfig,
        checkpoint: impl FnOnce() -> Result<Checkpoint>,
    ) -> Result<Box<dyn Backend>> {
        if !nodes.are_several() {
            return self.open_here(device, config);
        }
        let degrees = self.degrees();
        degrees.check(config)?;
        let mut devices = device.open_ranks(nodes.ranks(degrees)?)?;
        devices.extend(nodes.gather(config, &checkpoint()?, degrees)?);
        Ok(Box::new(Group::new(devices, degrees, config)?))
    }
}

/// The weights of the device that has most of them, in bytes, of a model whose weights take `stored` bytes.
pub(crate) fn heaviest(config: &ModelConfig, degrees: Parallelism, stored: u64) -> Result<u64> {
    if degrees == Parallelism::SINGLE {
        return Ok(stored);
    }
    let footprint = Footprint::new(config, degrees, Limits::smallest())?;
    Ok(footprint.heaviest(stored, config.weight_bytes(Dtype::Bf16)))
}

impl DeviceOptions {
    /// Opens the devices of this many ranks.
    pub(crate) fn open_ranks(&self, ranks: usize) -> backend::Result<Vec<Box<dyn Backend>>> {
        let given = self.given();
        if given.is_empty() {
            let first = self.open()?;
            // There is one CPU, which all ranks share.
            let all = first.device().backend == "cpu";
            let open = |rank| self.open_at(Some(if all { 0 } else { rank }));
            let rest = (1..ranks).map(open);
            return std::iter::once(Ok(first)).chain(rest).collect();
        }
        if given.len() != ranks {
            return Err(BackendError::Shape {
                operation: "--device",
                what: "the number of devices",
                expected: format!("{ranks}, one for each part (one may be named twice)"),
                found: given.len().to_string(),
            });
        }
        given
            .iter()
            .map(|index| self.open_at(Some(*index)))
            .collect()
    }
}
