//! Several devices for one model.

use anyhow::{Context, Result, ensure};
use clap::Args;
use clap::builder::RangedU64ValueParser;
use kimi_linear::backend::{Backend, Group, Parallelism};
use kimi_linear::config::{Dtype, ModelConfig};
use kimi_linear::model::{Footprint, Limits};

use super::options::DeviceOptions;

/// How several devices divide the model.
#[derive(Args, Clone, Copy)]
pub(crate) struct ParallelOptions {
    /// Number of devices that divide heads, hidden units and vocabulary, with the devices' numbers from 0, or as --device lists
    /// them (`--device 0,2`; one named twice takes two parts). Results pass through the host's memory.
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

    /// Opens the devices for a model.
    pub(crate) fn open(
        self,
        device: &DeviceOptions,
        config: &ModelConfig,
    ) -> Result<Box<dyn Backend>> {
        let degrees = self.degrees();
        degrees.check(config)?;
        let ranks = degrees.ranks();
        if ranks == 1 {
            return Ok(device.open()?);
        }
        let mut devices = Vec::with_capacity(ranks);
        for index in device.ranks(ranks)? {
            let opened = device.open_at(index).with_context(|| {
                format!("the model is to be divided among {ranks} devices; --device 0,0 gives two parts to one device")
            })?;
            devices.push(opened);
        }
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
    /// The number of each rank's device; `None` for the best.
    fn ranks(&self, ranks: usize) -> Result<Vec<Option<usize>>> {
        let given = self.given();
        if given.is_empty() {
            let first = self.open()?;
            // There is one CPU, which all ranks share.
            let all = first.device().backend == "cpu";
            let index = |rank| if all { 0 } else { rank };
            return Ok((0..ranks).map(|rank| Some(index(rank))).collect());
        }
        ensure!(
            given.len() == ranks,
            "--device names {} of the {ranks} devices that are to divide the model: expected one for each part (one may be named twice)",
            given.len()
        );
        Ok(given.iter().copied().map(Some).collect())
    }
}
