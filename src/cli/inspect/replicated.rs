//! What each of several replicas holds with all parameters, and with duplicates dropped.

use std::io::Write;

use anyhow::Result;
use kimi_linear::backend::{Device, Parallelism};
use kimi_linear::config::{Dtype, LayerBytes, ModelConfig};
use kimi_linear::data_parallel::{self, ParameterDrop, PoolSizes};
use kimi_linear::engine::{BLOCK_TOKENS, MemoryPlanner, PREFILL_CHUNK};
use serde::Serialize;

use super::super::data_parallel::ReplicaOptions;
use super::{Report, bytes};

/// Replicas on one kind of device.
#[derive(Serialize)]
pub(super) struct Replicated {
    data_parallel_size: usize,
    parameter_drop: ParameterDrop,
    /// The device, by backend and number.
    device: String,
    /// Bytes of each device that may be used.
    memory: u64,
    /// All parameters first, then groups of two replicas and more.
    states: Vec<State>,
    /// Why replicas do not fit there.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

/// Replicas that hold all parameters, or groups of some that hold one copy.
#[derive(Serialize)]
struct State {
    /// Replicas that share parameters.
    members: usize,
    /// Bytes of weights on the device that has most.
    weights: u64,
    /// Bytes of the caches of each replica.
    states: u64,
    latents: u64,
    #[serde(flatten)]
    sizes: PoolSizes,
    /// Tokens that the blocks of each replica hold.
    tokens: usize,
}

/// The bytes of each layer: as stored, if there are files.
fn layers(config: &ModelConfig, report: &Report) -> Vec<LayerBytes> {
    let mut layers = config.layer_bytes(report.dtype);
    let Some(stored) = &report.stored else {
        return layers;
    };
    let experts = layers.iter_mut().filter(|layer| layer.experts > 0);
    for (layer, bytes) in experts.zip(&stored.expert_bytes) {
        layer.experts = *bytes;
    }
    let rest = stored.bytes - stored.expert_bytes.iter().sum::<u64>();
    let all: u64 = layers.iter().map(|layer| layer.rest).sum();
    for layer in &mut layers {
        layer.rest = (layer.rest as f64 * rest as f64 / all.max(1) as f64) as u64;
    }
    layers
}

impl Replicated {
    /// Replicas on a device that has this memory for each.
    pub(super) fn new(
        config: &ModelConfig,
        options: ReplicaOptions,
        report: &Report,
        (device, cache): (&Device, Dtype),
        memory: u64,
    ) -> Self {
        let layers = layers(config, report);
        let planner = MemoryPlanner {
            sequences: report.sequences,
            context: Some(report.context),
            prefill_chunk: PREFILL_CHUNK,
            checkpoints: report.sequences.max(8),
            blocks: None,
            memory: Some(memory),
            speculative: 0,
            weights: report.weight_bytes,
            degrees: Parallelism::SINGLE,
            cache,
        };
        let (form, count) = (options.form(), options.count());
        let sizes = data_parallel::state_sizes(config, &layers, &planner, form, count);
        let reason = sizes.as_ref().err().map(ToString::to_string);
        let slot = config.kda_state_bytes(Dtype::F32);
        let block = config.latent_bytes_per_token(cache) * BLOCK_TOKENS as u64;
        let state = |(members, sizes): (usize, PoolSizes)| State {
            members,
            weights: data_parallel::device_weights(config, &layers, form, members),
            states: slot * sizes.slots as u64,
            latents: block * sizes.blocks as u64,
            sizes,
            tokens: sizes.blocks * BLOCK_TOKENS,
        };
        let all = sizes.into_iter().flat_map(|sizes| {
            let whole = std::iter::once((1, sizes.whole));
            whole.chain(sizes.dropped)
        });
        Self {
            data_parallel_size: count,
            parameter_drop: form,
            device: format!("{} {}", device.backend, device.index),
            memory,
            states: all.map(state).collect(),
            reason,
        }
    }

    pub(super) fn print(&self, out: &mut impl Write) -> Result<()> {
        writeln!(
            out,
            "{} replicas on devices like {}, with {} of each",
            self.data_parallel_size,
            self.device,
            bytes(self.memory)
        )?;
        for state in &self.states {
            let name = match state.members {
                1 => "all parameters".to_owned(),
                members => format!("one copy of {} among {members}", self.parameter_drop.name()),
            };
            writeln!(
                out,
                "  {name}: weights {}; for each replica states {} ({} slots), latents {} ({} blocks, {} tokens)",
                bytes(state.weights),
                bytes(state.states),
                state.sizes.slots,
                bytes(state.latents),
                state.sizes.blocks,
                state.tokens
            )?;
        }
        if let Some(reason) = &self.reason {
            writeln!(out, "  they do not fit: {reason}")?;
        } else if self.parameter_drop != ParameterDrop::None && self.states.len() == 1 {
            writeln!(
                out,
                "  nothing would be dropped: a replica would have less than an eighth more slots or blocks"
            )?;
        }
        Ok(())
    }
}
