//! Loads a model as several replicas, and starts their engines.

use std::ops::ControlFlow;

use super::client::DataParallel;
use super::groups::Groups;
use super::homes::ParameterDrop;
use super::sizes::{Budget, Ledger, PoolSizes, StateSizes, Wanted};
use crate::backend::{Backend, Device, Replicas};
use crate::checkpoint::Checkpoint;
use crate::config::{Dtype, LayerBytes, ModelConfig};
use crate::engine::{
    BLOCK_TOKENS, Engine, EngineHandle, EngineOptions, EngineSizes, MemoryPlanner,
};
use crate::error::{EngineError, Error};
use crate::llm::{CONTEXT, LlmFiles};
use crate::model::{Limits, Model};

/// How replicas are loaded.
#[derive(Clone, Copy, Debug)]
pub struct DataParallelOptions {
    /// Sizes of each replica, and the memory of each device.
    pub planner: MemoryPlanner,
    /// Options of each engine. Its queue is that of each replica.
    pub engine: EngineOptions,
    /// The parameters that are dropped under a burst.
    pub drop: ParameterDrop,
    /// Whether they are dropped and restored by demand; otherwise only by [`DataParallel::drop_parameters`] and
    /// [`DataParallel::restore_parameters`].
    pub automatic: bool,
}

/// Replicas that answer.
pub struct LoadedReplicas {
    /// The model's files.
    pub files: LlmFiles,
    /// The client of all replicas.
    pub client: DataParallel,
    /// The device of the first one.
    pub device: Device,
    /// Sizes of each replica before parameters are dropped.
    pub sizes: EngineSizes,
    /// The slots and blocks of all states.
    pub states: StateSizes,
}

/// The sizes of replicas with and without all parameters.
///
/// # Errors
/// Too little memory, or parameters that replicas cannot drop.
pub fn state_sizes(
    config: &ModelConfig,
    weights: &[LayerBytes],
    planner: &MemoryPlanner,
    form: ParameterDrop,
    replicas: usize,
) -> Result<StateSizes, EngineError> {
    form.check(config, replicas)?;
    let wanted = wanted(config, planner);
    budget(config, weights, planner, form, replicas).sizes(&wanted)
}

/// Bytes of weights on the device that has most of them, where a group of so many replicas has one copy of what it drops; with 1 all of
/// them.
#[must_use]
pub fn device_weights(
    config: &ModelConfig,
    weights: &[LayerBytes],
    form: ParameterDrop,
    members: usize,
) -> u64 {
    let budget = Budget::new(config, weights.to_vec(), form, members, Dtype::F32);
    let replicas: Vec<usize> = (0..members).collect();
    let homes = match members {
        1 => budget.whole(&replicas),
        _ => budget.dropped(&replicas),
    };
    Ledger::new(
        &budget,
        &replicas,
        &homes,
        &vec![PoolSizes::default(); members],
    )
    .peak()
}

/// The budget of each device.
pub(super) fn budget(
    config: &ModelConfig,
    weights: &[LayerBytes],
    planner: &MemoryPlanner,
    form: ParameterDrop,
    replicas: usize,
) -> Budget {
    let mut budget = Budget::new(config, weights.to_vec(), form, replicas, planner.cache);
    let largest = budget.groups().last().copied().unwrap_or(1) as u64;
    let sizes = planner.with(BLOCK_TOKENS, None);
    let (rows, outputs) = (sizes.rows(), sizes.outputs());
    // The rows of each chosen expert, and copies of the rows that they read.
    let exchanged = match form {
        ParameterDrop::Experts => {
            let chosen = config.num_experts_per_token;
            (rows * (chosen * config.hidden_size + config.hidden_size + 2 * chosen) * 4) as u64
        }
        _ => 0,
    };
    budget.memory = planner.memory.unwrap_or(u64::MAX);
    budget.activations = largest * (config.activation_bytes(rows, outputs) + exchanged);
    budget
}

/// What a replica would have with unlimited memory.
fn wanted(config: &ModelConfig, planner: &MemoryPlanner) -> Wanted {
    // One block more per sequence: a prefix that ends inside a block is continued in a copy of the block.
    let enough = |context: usize| context.min(config.model_max_length).div_ceil(BLOCK_TOKENS) + 1;
    let sizes = planner.with(BLOCK_TOKENS, None);
    let usual = planner.context.unwrap_or(CONTEXT);
    let longest = planner.context.unwrap_or(config.model_max_length);
    let most = planner.sequences.saturating_mul(enough(longest));
    Wanted {
        slots: sizes.limits(planner.cache).slots,
        blocks: planner.sequences.saturating_mul(enough(usual)),
        most_blocks: planner.blocks.unwrap_or(most),
        least_blocks: match planner.context {
            Some(context) => enough(context),
            None => enough(1),
        },
    }
}

impl LlmFiles {
    /// Loads a replica onto each of these devices, and starts their engines. `progress` receives the number of bytes loaded so far
    /// and in total; it cancels loading by breaking.
    ///
    /// # Errors
    /// No device, damaged weights, a device without enough memory, parameters that cannot be dropped, or cancelled loading.
    pub fn load_replicas(
        self,
        devices: Vec<Box<dyn Backend>>,
        options: &DataParallelOptions,
        progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
    ) -> Result<LoadedReplicas, Error> {
        let (form, replicas) = (options.drop, devices.len());
        form.check(&self.config, replicas)?;
        let device = devices.first().ok_or(EngineError::NoReplica)?;
        let device = device.device().clone();
        let checkpoint = self.checkpoint()?;
        let planner = MemoryPlanner {
            weights: checkpoint.total_bytes(),
            ..options.planner
        };
        let layers = checkpoint.layer_bytes(&self.config);
        let states = state_sizes(&self.config, &layers, &planner, form, replicas)?;
        let sizes = planner.with_blocks(&self.config, states.whole.blocks);
        let mut limits = sizes.limits(planner.cache);
        let mut engine = EngineOptions {
            // Answers of a lost replica find room.
            queue: usize::MAX,
            ..options.engine
        };
        (limits.slots, limits.blocks) = (states.whole.slots, states.whole.blocks);
        let (backends, groups) = match form {
            ParameterDrop::None => (devices, None),
            _ => {
                engine.keep_on_device_error = true;
                let all = Replicas::new(devices, &self.config)?;
                let each = (0..replicas).map(|replica| all.backend(replica)).collect();
                let budget = budget(&self.config, &layers, &planner, form, replicas);
                (each, Some(Groups::new(all, budget, states.clone())))
            }
        };
        let engines = self.start(&checkpoint, backends, limits, engine, progress)?;
        let most = sizes.sequences.saturating_add(options.engine.queue);
        let mut client = DataParallel::new(engines, most, sizes.context);
        if let Some(groups) = groups {
            client = client.controlled(groups, options.automatic)?;
        }
        Ok(LoadedReplicas {
            files: self,
            client,
            device,
            sizes,
            states,
        })
    }

    /// Loads a model into each of these backends, and starts its engine.
    pub(super) fn start(
        &self,
        checkpoint: &Checkpoint,
        backends: Vec<Box<dyn Backend>>,
        limits: Limits,
        options: EngineOptions,
        progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
    ) -> Result<Vec<EngineHandle>, Error> {
        let bytes = checkpoint.total_bytes();
        let total = bytes * backends.len() as u64;
        let mut engines = Vec::with_capacity(backends.len());
        for backend in backends {
            let before = bytes * engines.len() as u64;
            let progress = &mut |done| progress(before + done, total);
            let model = Model::load_while(&self.config, checkpoint, backend, limits, progress)?;
            let engine = Engine::new(model, options).suppress_tokens(self.tokenizer.unused_ids());
            let started = EngineHandle::start(engine);
            engines.push(started.map_err(|error| EngineError::NoThread {
                reason: error.to_string(),
            })?);
        }
        Ok(engines)
    }
}
