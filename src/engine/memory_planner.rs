//! Computes the sizes of an engine from the memory of its device.

use super::options::{BLOCK_TOKENS, EngineSizes};
use crate::backend::Parallelism;
use crate::config::{Dtype, ModelConfig};
use crate::error::EngineError;

/// What an engine must hold; what is `None` is sized by the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlanner {
    /// Maximum number of running sequences.
    pub sequences: usize,
    /// Maximum tokens of a sequence; `None` for what the model allows and memory holds.
    pub context: Option<usize>,
    /// Maximum prompt tokens of a step.
    pub prefill_chunk: usize,
    /// State slots for checkpoints.
    pub checkpoints: usize,
    /// Blocks of latents; `None` for enough for every sequence's context, or as many as fit.
    pub blocks: Option<usize>,
    /// Memory budget in bytes, of each device; `None` for no limit.
    pub memory: Option<u64>,
    /// Maximum number of tokens that are proposed for a sequence in one step; 0 without speculation.
    pub speculative: usize,
    /// Bytes of the weights, on the device that has most of them; without those that stay on the host.
    pub weights: u64,
    /// How several devices divide the model.
    pub degrees: Parallelism,
    /// Dtype of the latent cache.
    pub cache: Dtype,
}

impl MemoryPlanner {
    /// The planner of an engine of these sizes, which must all fit, without weights and without a budget.
    #[must_use]
    pub fn of(sizes: &EngineSizes, cache: Dtype) -> Self {
        Self {
            sequences: sizes.sequences,
            context: Some(sizes.context),
            prefill_chunk: sizes.prefill_chunk,
            checkpoints: sizes.checkpoints,
            blocks: Some(sizes.limits(cache).blocks),
            memory: None,
            speculative: sizes.speculative,
            weights: 0,
            degrees: Parallelism::SINGLE,
            cache,
        }
    }

    /// The smallest number of layers whose routed experts must stay on the host, of the first ones that have some, so that the rest of
    /// the weights fits on the device beside states, latents and activations. `experts` has the bytes of each of these layers,
    /// in their order, all of which are among [`MemoryPlanner::weights`].
    ///
    /// # Errors
    /// Too little memory even with the experts of all layers on the host.
    pub fn fewest_on_host(
        &self,
        config: &ModelConfig,
        experts: &[u64],
    ) -> Result<usize, EngineError> {
        let mut planner = *self;
        let mut count = 0;
        loop {
            match (planner.sizes(config), experts.get(count)) {
                (Ok(_), _) => return Ok(count),
                (Err(error), None) => return Err(error),
                (Err(_), Some(bytes)) => {
                    planner.weights = planner.weights.saturating_sub(*bytes);
                    count += 1;
                }
            }
        }
    }

    /// The sizes of an engine for `config` within this memory.
    ///
    /// # Errors
    /// Too little memory for one sequence of the context in addition to the weights and the states.
    pub fn sizes(&self, config: &ModelConfig) -> Result<EngineSizes, EngineError> {
        let context = self.context.unwrap_or(config.model_max_length);
        let context = context.min(config.model_max_length);
        let sizes = |context: usize, blocks: usize| self.with(context, Some(blocks));
        // One block more per sequence: a prefix that ends inside a block is continued in a copy of the block.
        let enough = |context: usize| context.div_ceil(BLOCK_TOKENS) + 1;
        let most = self.sequences.saturating_mul(enough(context));
        let Some(memory) = self.memory else {
            let blocks = self.blocks.unwrap_or(most);
            return Ok(sizes(self.fitting(context, blocks), blocks));
        };
        let [states, activations] = self.states_and_activations(config);
        let fixed = [self.weights, states, activations];
        let fixed = fixed.into_iter().fold(0, u64::saturating_add);
        let block = self.block_bytes(config);
        let fitting_blocks = memory.saturating_sub(fixed) / block.max(1);
        let fitting_blocks = usize::try_from(fitting_blocks).unwrap_or(usize::MAX);
        let blocks = self.blocks.unwrap_or(most.min(fitting_blocks));
        // Without a given context, the context is what a single sequence can have.
        let least = match self.context {
            Some(_) => enough(context),
            None => enough(1),
        };
        if fixed > memory || blocks > fitting_blocks || blocks < least {
            let latents = blocks.max(least) as u64 * block;
            return Err(EngineError::TooLittleMemory {
                memory,
                weights: self.weights,
                states,
                activations,
                latents,
            });
        }
        Ok(sizes(self.fitting(context, blocks), blocks))
    }

    /// Bytes of the budget that an engine of these sizes leaves; `None` where there is no limit.
    #[must_use]
    pub fn left(&self, config: &ModelConfig, sizes: &EngineSizes) -> Option<u64> {
        let blocks = sizes.blocks.unwrap_or_default() as u64;
        let [states, activations] = self.states_and_activations(config);
        let latents = blocks.saturating_mul(self.block_bytes(config));
        let held = [self.weights, states, activations, latents];
        let held = held.into_iter().fold(0, u64::saturating_add);
        self.memory.map(|memory| memory.saturating_sub(held))
    }

    /// The sizes with this number of blocks, and the longest context that it holds.
    #[cfg(feature = "data-parallel")]
    pub(crate) fn with_blocks(&self, config: &ModelConfig, blocks: usize) -> EngineSizes {
        let context = self.context.unwrap_or(config.model_max_length);
        let context = context.min(config.model_max_length);
        self.with(self.fitting(context, blocks), Some(blocks))
    }

    /// The sizes with this context and number of blocks.
    pub(crate) fn with(&self, context: usize, blocks: Option<usize>) -> EngineSizes {
        EngineSizes {
            sequences: self.sequences,
            context,
            prefill_chunk: self.prefill_chunk,
            // A prompt's own logits are read back for requests that ask for its log-probabilities.
            scored: BLOCK_TOKENS,
            checkpoints: self.checkpoints,
            blocks,
            speculative: self.speculative,
        }
    }

    fn states_and_activations(&self, config: &ModelConfig) -> [u64; 2] {
        let sizes = self.with(0, None);
        let slots = (self.sequences + self.checkpoints + sizes.spare_slots()) as u64;
        let states = config.kda_state_bytes(Dtype::F32).saturating_mul(slots);
        let states = self.of_stage(states, config.kda_layers().collect(), config);
        let states = states.div_ceil(self.degrees.tensor as u64);
        [
            states,
            config.activation_bytes(sizes.rows(), sizes.outputs()),
        ]
    }

    fn block_bytes(&self, config: &ModelConfig) -> u64 {
        let block = config.latent_bytes_per_token(self.cache) * BLOCK_TOKENS as u64;
        self.of_stage(block, config.mla_layers().collect(), config)
    }

    /// The part of these bytes, which all of `layers` have alike, in the pipeline stage that has most of these.
    fn of_stage(&self, bytes: u64, layers: Vec<usize>, config: &ModelConfig) -> u64 {
        let stages = self.degrees.stages(config.layers.len());
        let count = |stage: &std::ops::Range<usize>| {
            layers.iter().filter(|layer| stage.contains(layer)).count() as u64
        };
        let most = stages.iter().map(count).max().unwrap_or_default();
        (bytes / layers.len().max(1) as u64).saturating_mul(most)
    }

    /// The context, limited to what this number of blocks holds.
    fn fitting(&self, context: usize, blocks: usize) -> usize {
        context.min(blocks.saturating_sub(1).max(1).saturating_mul(BLOCK_TOKENS))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn config() -> ModelConfig {
        ModelConfig::from_file(Path::new("assets/shapes/48b.json")).unwrap()
    }

    fn planner(memory: u64) -> MemoryPlanner {
        MemoryPlanner {
            sequences: 8,
            context: None,
            prefill_chunk: 512,
            checkpoints: 8,
            blocks: None,
            speculative: 0,
            memory: Some(memory),
            weights: 98 << 30,
            degrees: Parallelism::SINGLE,
            cache: Dtype::Bf16,
        }
    }

    #[test]
    fn what_is_open_takes_what_is_left() {
        let (config, gib) = (config(), 1 << 30);
        // 16 slots of 42.8 MiB, and activations, leave about 11 of 110 GiB; a token takes 8,064 bytes.
        let sizes = planner(110 * gib).sizes(&config).unwrap();
        let blocks = sizes.blocks.unwrap();
        let bytes = blocks as u64 * 64 * 8064;
        assert!((10 * gib..12 * gib).contains(&bytes), "{bytes}");
        assert_eq!(
            sizes.context,
            config.model_max_length.min((blocks - 1) * 64)
        );
        // What is left is less than a block.
        let left = planner(110 * gib).left(&config, &sizes).unwrap();
        assert!(left < 64 * 8064, "{left}");
        // With ample memory there are enough blocks for all sequences, and no more.
        let sizes = planner(1 << 44).sizes(&config).unwrap();
        assert_eq!(sizes.context, config.model_max_length);
        assert_eq!(
            sizes.blocks.unwrap(),
            8 * (config.model_max_length.div_ceil(64) + 1)
        );
    }

    #[test]
    fn as_few_experts_stay_on_the_host_as_memory_requires() {
        let config = config();
        let experts = config.expert_bytes(Dtype::Bf16);
        assert_eq!(experts.len(), 26);
        assert!(
            experts
                .iter()
                .all(|bytes| *bytes == 256 * 3 * 1024 * 2304 * 2)
        );
        let sizes = EngineSizes::one(32_768);
        let planner = |memory: u64| MemoryPlanner {
            memory: Some(memory),
            weights: config.weight_bytes(Dtype::Bf16),
            ..MemoryPlanner::of(&sizes, Dtype::Bf16)
        };
        let count = |memory| planner(memory).fewest_on_host(&config, &experts);
        assert_eq!(count(1 << 40), Ok(0));
        let mut before = 0;
        for gib in (4..=100).rev() {
            let Ok(count) = count(gib << 30) else {
                // Attention, shared experts, embedding and head take 4 GB, and the caches of a sequence some more.
                assert!(gib < 6 && before == 26, "{gib} GiB");
                continue;
            };
            assert!(count >= before, "{gib} GiB: {count} after {before}");
            before = count;
            let left = |count: usize| {
                let on_host: u64 = experts.iter().take(count).sum();
                let planner = planner(gib << 30);
                let weights = planner.weights - on_host;
                MemoryPlanner { weights, ..planner }.sizes(&config)
            };
            // All of the context that was asked for, and not with a layer less.
            assert_eq!(left(count).unwrap().context, 32_768);
            assert!(count == 0 || left(count - 1).is_err(), "{gib} GiB");
        }
        let error = count(1 << 30).unwrap_err().to_string();
        assert!(error.contains("of weights"), "{error}");
    }

    #[test]
    fn what_does_not_fit_is_refused_with_its_parts() {
        let config = config();
        let long = MemoryPlanner {
            context: Some(1 << 20),
            ..planner(100 << 30)
        };
        for planner in [planner(98 << 30), long] {
            let error = planner.sizes(&config).unwrap_err().to_string();
            assert!(error.contains("weights"), "{error}");
        }
        let few = MemoryPlanner {
            blocks: Some(3),
            context: Some(1000),
            ..planner(1 << 44)
        };
        assert!(few.sizes(&config).is_err());
        let few = MemoryPlanner {
            context: None,
            ..few
        };
        assert_eq!(few.sizes(&config).unwrap().context, 128);
    }
}
