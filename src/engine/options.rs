//! How much an engine holds, and how it behaves when that is not enough.

use crate::backend::Capacity;
use crate::config::{Dtype, ModelConfig};
use crate::model::Limits;

/// Tokens in a block of latents.
pub const BLOCK_TOKENS: usize = 64;

/// The longest segment of a prompt in one step. A multiple of [`BLOCK_TOKENS`], so that cuts fall on block borders.
pub const PREFILL_CHUNK: usize = 512;

/// What an engine's model has to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineSizes {
    /// Sequences at a time.
    pub sequences: usize,
    /// Tokens that a sequence may reach.
    pub context: usize,
    /// Tokens of prompts in one step.
    pub prefill_chunk: usize,
    /// Tokens of a prompt whose own logits are wanted, in one step.
    pub scored: usize,
    /// State slots beyond one a sequence: for checkpoints.
    pub checkpoints: usize,
    /// Blocks of latents, of [`BLOCK_TOKENS`] tokens; `None` for enough for every sequence's context.
    pub blocks: Option<usize>,
}

impl EngineSizes {
    /// One sequence, and a few checkpoints beside it.
    #[must_use]
    pub fn one(context: usize) -> Self {
        Self {
            sequences: 1,
            context,
            prefill_chunk: PREFILL_CHUNK,
            scored: 0,
            checkpoints: 3,
            blocks: None,
        }
    }

    /// The pools and steps of a model that holds this much.
    #[must_use]
    pub fn limits(&self, cache: Dtype) -> Limits {
        let table = self.context.div_ceil(BLOCK_TOKENS);
        let step = Capacity {
            tokens: self.prefill_chunk + self.sequences,
            segments: self.sequences,
            outputs: self.sequences + self.scored,
            blocks: self.sequences * table,
            checkpoints: self.checkpoints.min(self.sequences + 1),
        };
        Limits {
            step,
            slots: self.sequences + self.checkpoints,
            // One block more a sequence: a prefix that ends inside a block is continued in a copy of it.
            blocks: self.blocks.unwrap_or(self.sequences * (table + 1)),
            block_tokens: BLOCK_TOKENS,
            cache,
        }
    }
}

/// How an engine behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineOptions {
    /// Prompts are cut at multiples of so many tokens, and segments are as long as one step allows.
    pub cut: usize,
    /// A checkpoint every so many blocks of a prompt.
    pub checkpoint_blocks: usize,
    /// Bytes of host memory for checkpoints and latents that have left the device.
    pub host_bytes: u64,
    /// Tokens that a sequence may generate while others wait, before it makes room for them.
    pub quantum: usize,
    /// Compiled steps that are kept.
    pub cached_steps: usize,
    /// Answers that may wait beyond those that there is room for in one step; a request past them is refused.
    pub queue: usize,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            cut: BLOCK_TOKENS,
            checkpoint_blocks: 64,
            host_bytes: 4 << 30,
            quantum: 512,
            cached_steps: 24,
            queue: usize::MAX,
        }
    }
}

/// Tokens that a sequence may reach: what the model allows and one sequence can hold.
pub(super) fn context(config: &ModelConfig, limits: &Limits) -> usize {
    let most = limits.blocks.min(limits.step.blocks);
    config.model_max_length.min(most * limits.block_tokens)
}
