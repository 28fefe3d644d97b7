//! Sizes of an engine, and its behaviour at their limits.

use super::lookup::PromptLookup;
use crate::backend::Capacity;
use crate::config::Dtype;
use crate::model::Limits;

/// Tokens in a block of latents.
pub const BLOCK_TOKENS: usize = 64;

/// Maximum length of a prompt segment in one step. A multiple of [`BLOCK_TOKENS`], so that cuts fall on block boundaries.
pub const PREFILL_CHUNK: usize = 512;

/// Sizes that an engine's model is loaded with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineSizes {
    /// Maximum number of running sequences.
    pub sequences: usize,
    /// Maximum tokens of a sequence.
    pub context: usize,
    /// Maximum prompt tokens of a step.
    pub prefill_chunk: usize,
    /// Maximum prompt tokens of a step whose own logits are read back.
    pub scored: usize,
    /// State slots for checkpoints, in addition to one per sequence.
    pub checkpoints: usize,
    /// Number of latent blocks of [`BLOCK_TOKENS`] tokens; `None` for enough for every sequence's context.
    pub blocks: Option<usize>,
    /// Maximum number of tokens that are proposed for a sequence in one step ([`EngineOptions::prompt_lookup`]). Unless it is 0,
    /// there is a second state slot for each sequence.
    pub speculative: usize,
}

impl EngineSizes {
    /// One sequence, with slots for a few checkpoints.
    #[must_use]
    pub fn one(context: usize) -> Self {
        Self {
            sequences: 1,
            context,
            prefill_chunk: PREFILL_CHUNK,
            scored: 0,
            checkpoints: 3,
            blocks: None,
            speculative: 0,
        }
    }

    /// State slots for what speculation keeps in addition to the states of the sequences.
    pub(super) fn spare_slots(&self) -> usize {
        if self.speculative > 0 {
            self.sequences
        } else {
            0
        }
    }

    /// Maximum tokens of a step.
    pub(crate) fn rows(&self) -> usize {
        let proposed = self.sequences * (self.speculative + 1);
        proposed.max(self.prefill_chunk + self.sequences)
    }

    /// Maximum rows of logits of a step. Prompts and proposals have none in the same step.
    pub(crate) fn outputs(&self) -> usize {
        let proposed = self.sequences * self.speculative;
        self.sequences + self.scored.max(proposed)
    }

    /// The limits of pools and steps for a model of these sizes.
    #[must_use]
    pub fn limits(&self, cache: Dtype) -> Limits {
        let table = self.context.div_ceil(BLOCK_TOKENS);
        let spare = self.spare_slots();
        let step = Capacity {
            tokens: self.rows(),
            segments: self.sequences,
            outputs: self.outputs(),
            blocks: self.sequences * table,
            checkpoints: self.checkpoints.min(self.sequences + 1) + spare,
        };
        Limits {
            step,
            slots: self.sequences + self.checkpoints + spare,
            // One block more per sequence: a prefix that ends inside a block is continued in a copy of the block.
            blocks: self.blocks.unwrap_or(self.sequences * (table + 1)),
            block_tokens: BLOCK_TOKENS,
            cache,
        }
    }
}

/// Options of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineOptions {
    /// Prompts are cut at multiples of this number of tokens; segments are as long as a step allows.
    pub cut: usize,
    /// Distance between checkpoints in a prompt, in blocks.
    pub checkpoint_blocks: usize,
    /// Bytes of host memory for checkpoints and latents that were evicted from the device.
    pub host_bytes: u64,
    /// Tokens that a sequence may generate while others wait, before it may be preempted for them.
    pub quantum: usize,
    /// Number of compiled steps to keep.
    pub cached_steps: usize,
    /// Whether the next step is submitted before the tokens of the present one are known, where the device runs while the host
    /// works and no draw depends on these tokens. Answers have the same bits.
    pub async_scheduling: bool,
    /// How tokens are proposed for decoding sequences, several of which are then verified in one step; `None` for no
    /// speculation. It needs a free state slot per sequence, and rows of the step ([`EngineSizes::speculative`]).
    pub prompt_lookup: Option<PromptLookup>,
    /// Whether the requests of an engine whose device fails are kept: it then does nothing until
    /// [`Engine::resume`](super::Engine::resume), and computes them again from their tokens. Otherwise they fail.
    pub keep_on_device_error: bool,
    /// Maximum number of waiting answers, in addition to those that fit into one step; further requests are refused.
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
            async_scheduling: true,
            prompt_lookup: None,
            keep_on_device_error: false,
            queue: usize::MAX,
        }
    }
}
