//! What each of several devices holds of a model, and what they send.

use std::io::Write;

use anyhow::Result;
use kimi_linear::backend::{Capacity, Parallelism};
use kimi_linear::config::{Dtype, ModelConfig};
use kimi_linear::engine;
use kimi_linear::model::{Footprint, Limits};
use serde::Serialize;

use super::bytes;

/// The devices that divide the model.
#[derive(Serialize)]
pub(super) struct Divided {
    tensor_parallel_size: usize,
    expert_parallel_size: usize,
    pipeline_parallel_size: usize,
    /// The dtype that latents are counted in.
    cache: Dtype,
    #[serde(flatten)]
    footprint: Footprint,
}

impl Divided {
    /// Sizes for `sequences` of `context` tokens. `stored` are the bytes of the weights, of which every device has as large a part
    /// as it would have of an unquantised model.
    pub(super) fn new(
        config: &ModelConfig,
        degrees: Parallelism,
        (sequences, context): (usize, usize),
        cache: Dtype,
        stored: u64,
    ) -> Result<Self> {
        degrees.check(config)?;
        let blocks = sequences * context.div_ceil(engine::BLOCK_TOKENS);
        let limits = Limits {
            step: Capacity {
                tokens: engine::PREFILL_CHUNK,
                segments: sequences.min(engine::PREFILL_CHUNK),
                outputs: sequences.min(engine::PREFILL_CHUNK),
                blocks,
                checkpoints: 0,
            },
            slots: sequences,
            blocks,
            block_tokens: engine::BLOCK_TOKENS,
            cache,
        };
        let mut footprint = Footprint::new(config, degrees, limits)?;
        let share = stored as f64 / config.weight_bytes(Dtype::Bf16).max(1) as f64;
        for rank in &mut footprint.ranks {
            rank.weights = (rank.weights as f64 * share) as u64;
        }
        Ok(Self {
            tensor_parallel_size: degrees.tensor,
            expert_parallel_size: degrees.expert,
            pipeline_parallel_size: degrees.pipeline,
            cache,
            footprint,
        })
    }

    pub(super) fn print(&self, out: &mut impl Write) -> Result<()> {
        let ranks = &self.footprint.ranks;
        writeln!(out, "divided among {} devices", ranks.len())?;
        let mut first = 0;
        while let Some(rank) = ranks.get(first) {
            // Ranks that hold the same are one line.
            let alike = ranks[first..]
                .iter()
                .take_while(|other| *other == rank)
                .count();
            let name = match alike {
                1 => format!("device {first}"),
                _ => format!("devices {first} to {}, each", first + alike - 1),
            };
            let total = rank.weights + rank.latents + rank.states + rank.activations;
            writeln!(
                out,
                "  {name}: weights {}, latents {} ({}), states {}, activations {}: {}",
                bytes(rank.weights),
                bytes(rank.latents),
                self.cache,
                bytes(rank.states),
                bytes(rank.activations),
                bytes(total)
            )?;
            first += alike;
        }
        writeln!(
            out,
            "  sent between devices and host (without NCCL): {} per token, {} per row of logits",
            bytes(self.footprint.sent_per_token),
            bytes(self.footprint.sent_per_output)
        )?;
        Ok(())
    }
}
