//! The forward pass of Kimi Linear, written once for all backends.
//!
//! A [`Model`] owns a backend with the weights, the two pools and the activations in it, and builds the programs that the
//! backend compiles. It holds no sequences: the engine assigns slots and blocks to them.

#[cfg(not(target_arch = "wasm32"))]
mod footprint;
mod load;
mod observe;
mod origin;
mod program;
mod resize;
mod source;
mod trace;
mod weight_source;

#[cfg(not(target_arch = "wasm32"))]
pub use footprint::Footprint;
pub use observe::{LayerInput, LayerRoutes, Observe, Observed, Observer};
pub use origin::ModelPart;
pub use trace::{
    AttentionTrace, ExpertTrace, KdaHeadTrace, KdaTrace, OperationTime, StateTrace, TraceChoice,
    TraceFrame, TraceHead, TracedStep,
};
#[cfg(all(feature = "transfer", not(target_arch = "wasm32")))]
pub(crate) use weight_source::weight_source;

use std::ops::ControlFlow;

use origin::Origin;
use source::Source;

use crate::backend::{
    Backend, Capacity, DrawCapacity, KdaBlock, LatentPool, MlaBlock, MlpBlock, MoeBlock, Program,
    Random, StatePool, Step, Tensor, Weight,
};
use crate::checkpoint::Checkpoint;
use crate::config::{Attention, Dtype, ModelConfig};
use crate::error::{BackendError, Error};

/// The sizes of a model's activations and pools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Maximum sizes of one step.
    pub step: Capacity,
    /// Number of KDA state slots, one per sequence or checkpoint.
    pub slots: usize,
    /// Number of MLA latent blocks.
    pub blocks: usize,
    /// Tokens per block.
    pub block_tokens: usize,
    /// The dtype of cached latents.
    pub cache: Dtype,
}

impl Limits {
    /// One sequence of one token.
    #[must_use]
    pub fn smallest() -> Self {
        Self {
            step: Capacity {
                tokens: 1,
                segments: 1,
                outputs: 1,
                blocks: 1,
                checkpoints: 0,
            },
            slots: 1,
            blocks: 1,
            block_tokens: 1,
            cache: Dtype::F32,
        }
    }
}

/// What a step returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepOptions {
    /// Number of candidates for each output row, at least 1.
    pub candidates: usize,
    /// Whether whole rows of logits are returned.
    pub keep_rows: bool,
    /// Whether the residual stream is returned: the embedding, then the stream after each layer, then the logits.
    pub probe_hidden: bool,
    /// Maximum sizes of a batch's draws; without any nothing is drawn.
    pub draws: DrawCapacity,
}

/// Where the caches of a layer are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerCache {
    /// In the pool of states, at this layer index.
    State(usize),
    /// In the pool of latents, at this layer index.
    Latents(usize),
}

/// One layer: a norm, an attention block, a norm, a feed-forward block.
struct Layer {
    input_norm: Weight,
    attention: AttentionBlock,
    post_attention_norm: Weight,
    ffn: FfnBlock,
}

enum AttentionBlock {
    Kda(Box<KdaBlock>),
    Mla(Box<MlaBlock>),
}

enum FfnBlock {
    Dense(Box<MlpBlock>),
    Moe(Box<MoeBlock>),
}

/// Activations that every layer shares.
#[derive(Clone, Copy)]
struct Stream {
    /// The residual stream, `[T, d]`.
    hidden: Tensor,
    /// The normalised stream, the input of a block, `[T, d]`.
    normed: Tensor,
    /// The output of a block, `[T, d]`.
    output: Tensor,
}

/// The head's activations.
#[derive(Clone, Copy)]
struct Head {
    /// `[O, d]`.
    normed: Tensor,
    /// `[O, local vocabulary]`, f32.
    local_logits: Tensor,
    /// `[O, vocabulary]`, f32; the same tensor if one rank holds the whole vocabulary.
    logits: Tensor,
    /// `[draws, 2]`: the drawn tokens and their logits, for the next step.
    drawn: Tensor,
}

/// A loaded model.
pub struct Model {
    config: ModelConfig,
    origin: Origin,
    backend: Box<dyn Backend>,
    limits: Limits,
    embedding: Weight,
    layers: Vec<Layer>,
    final_norm: Weight,
    lm_head: Weight,
    states: StatePool,
    latents: LatentPool,
    stream: Stream,
    head: Head,
    activation_bytes: u64,
    /// Maximum tokens of a sequence in the pools of the size that the model was loaded with.
    positions: usize,
    /// The outputs of traced steps, planned when the first one is compiled.
    trace: Option<trace::TraceTensors>,
}

impl Model {
    /// Loads the weights of `checkpoint` into `backend` and plans pools and activations. `progress` receives the number of
    /// bytes loaded so far, of [`Checkpoint::total_bytes`].
    ///
    /// # Errors
    /// Too little memory, or heads, experts or a vocabulary that cannot be divided among the backend's ranks.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn load(
        config: &ModelConfig,
        checkpoint: &Checkpoint,
        backend: Box<dyn Backend>,
        limits: Limits,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self, Error> {
        let progress = &mut |done| {
            progress(done);
            ControlFlow::Continue(())
        };
        Self::load_while(config, checkpoint, backend, limits, progress)
    }

    /// The same; `progress` can cancel loading by breaking.
    ///
    /// # Errors
    /// Those of [`Model::load`], and [`Error::LoadStopped`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn load_while(
        config: &ModelConfig,
        checkpoint: &Checkpoint,
        backend: Box<dyn Backend>,
        limits: Limits,
        progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
    ) -> Result<Self, Error> {
        let source = Source::Stored(checkpoint);
        pollster::block_on(load::load(config, source, backend, limits, progress))
    }

    /// Loads the weights of `checkpoint`, reading each when it is its turn. `progress` receives the number of bytes so far, and
    /// cancels loading by breaking.
    ///
    /// # Errors
    /// Files that cannot be read, too little memory, and [`Error::LoadStopped`].
    #[cfg(target_arch = "wasm32")]
    pub async fn load_while(
        config: &ModelConfig,
        checkpoint: &Checkpoint,
        backend: Box<dyn Backend>,
        limits: Limits,
        progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
    ) -> Result<Self, Error> {
        let source = Source::Stored(checkpoint);
        load::load(config, source, backend, limits, progress).await
    }

    /// A model of this shape with random weights that are generated on the device, in bf16 (`A_log` and `dt_bias` in f32), to
    /// measure a shape without its files. Weights are scaled by their number of inputs, norms are about 1, and gates are
    /// those of a freshly initialised model, so that activations stay finite. The same seed gives the same model on every
    /// backend; the ranks of a model do not share one set of weights. `progress` receives the number of bytes generated so
    /// far, of [`ModelConfig::weight_bytes`].
    ///
    /// # Errors
    /// Too little memory, a backend that generates no random numbers, or sizes that cannot be divided among its ranks.
    pub fn random(
        config: &ModelConfig,
        seed: u32,
        backend: Box<dyn Backend>,
        limits: Limits,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self, Error> {
        let progress = &mut |done| {
            progress(done);
            ControlFlow::Continue(())
        };
        let source = Source::random(config, seed);
        // There are no files to wait for.
        pollster::block_on(load::load(config, source, backend, limits, progress))
    }

    /// Fills every slot and every block with random numbers that are generated on the device, in place of the caches of a
    /// long context, to measure steps at that context. States have small entries, like those of a long prompt; latents are
    /// about as large as normalised ones.
    ///
    /// # Errors
    /// A device that was lost, or a backend that generates no random numbers.
    pub fn fill_caches(&mut self, seed: u32) -> Result<(), BackendError> {
        let states = Random::named("states", seed, -3);
        let latents = Random::named("latents", seed, 0);
        self.backend.fill_states(&self.states, states)?;
        self.backend.fill_latents(&self.latents, latents)
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The sizes that the model was made for.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Maximum tokens of a sequence: what the model allows, and one sequence can hold in pools of the size that the model was loaded
    /// with. It stays the same when their size changes, so that no answer depends on that.
    #[must_use]
    pub fn context(&self) -> usize {
        self.config.model_max_length.min(self.positions)
    }

    /// Bytes of the planned activations, in f32.
    #[must_use]
    pub fn activation_bytes(&self) -> u64 {
        self.activation_bytes
    }

    /// The pool of KDA states.
    #[must_use]
    pub fn states(&self) -> StatePool {
        self.states
    }

    /// The pool of MLA latents.
    #[must_use]
    pub fn latents(&self) -> LatentPool {
        self.latents
    }

    /// The backend, for access to its pools.
    pub fn backend(&mut self) -> &mut dyn Backend {
        &mut *self.backend
    }

    /// Compiles the forward pass for batches of at most `capacity`.
    ///
    /// # Errors
    /// A capacity beyond the model's limits, or too little memory.
    pub fn step(
        &mut self,
        capacity: Capacity,
        step_options: StepOptions,
    ) -> Result<Box<dyn Step>, BackendError> {
        self.compile(&self.program(step_options), capacity)
    }

    /// Compiles the forward pass with segments of any length in the form of single tokens ([`Model::stepwise_program`]).
    ///
    /// # Errors
    /// Those of [`Model::step`].
    pub fn stepwise_step(
        &mut self,
        capacity: Capacity,
        step_options: StepOptions,
    ) -> Result<Box<dyn Step>, BackendError> {
        self.compile(&self.stepwise_program(step_options), capacity)
    }

    /// Compiles the forward pass in parts of one layer each ([`Model::program_of`]), so that each layer's caches can be
    /// read while later layers are computed. Only the last part has output.
    ///
    /// # Errors
    /// Those of [`Model::step`].
    pub fn layer_steps(
        &mut self,
        capacity: Capacity,
        step_options: StepOptions,
    ) -> Result<Vec<Box<dyn Step>>, BackendError> {
        let layers = 0..self.layers.len();
        let part = |layer| {
            let program = self.program_of(layer..layer + 1, step_options);
            self.compile(&program, capacity)
        };
        layers.map(part).collect()
    }

    /// The pool of a layer's caches, with its index among the layers of its kind.
    #[must_use]
    pub fn layer_cache(&self, layer: usize) -> LayerCache {
        let kind = self.config.layers[layer].attention;
        let before = &self.config.layers[..layer];
        let place = before
            .iter()
            .filter(|other| other.attention == kind)
            .count();
        match kind {
            Attention::Kda => LayerCache::State(place),
            Attention::Mla => LayerCache::Latents(place),
        }
    }

    fn compile(
        &mut self,
        program: &Program,
        capacity: Capacity,
    ) -> Result<Box<dyn Step>, BackendError> {
        if let Some((what, most, found)) = capacity.beyond(&self.limits.step) {
            return Err(BackendError::Batch {
                what: format!("a step's capacity for {what}"),
                expected: format!("at most {most}"),
                found: found.to_string(),
            });
        }
        self.backend.compile(program, capacity)
    }
}
