//! The model of a worker: loaded once, whatever roles the worker has afterwards.

use std::ops::ControlFlow;
use std::sync::Arc;

use anyhow::Result;
use kimi_linear::backend::{self, Backend, Device, Parallelism, host_memory};
use kimi_linear::checkpoint::ModelFiles;
use kimi_linear::data_parallel::{DataParallelOptions, Pair, PairOptions, ParameterDrop};
use kimi_linear::engine::{EngineHandle, EngineOptions, EngineSizes, MemoryPlanner};
use kimi_linear::llm::{LlmFiles, LlmOptions};
use kimi_linear::server::SamplingDefaults;

use super::grammars::GrammarCache;
use super::options::Options;
use super::parameters::Sample;

/// A loaded model with its engine.
pub(super) struct Model {
    pub(super) engine: EngineHandle,
    pub(super) grammars: GrammarCache,
    /// Tokens that end an answer.
    pub(super) stop_ids: Vec<u32>,
    /// Sampling parameters of requests that set none; only other frontends send such requests.
    pub(super) defaults: SamplingDefaults,
    /// Maximum tokens of a prompt and its answer together.
    pub(super) context: usize,
    pub(super) sizes: EngineSizes,
    /// The part in a pair that drops parameters together.
    pair: Option<Pair>,
}

impl Model {
    /// Loads the model. It blocks, for minutes where the model is large.
    ///
    /// # Errors
    /// Files that are missing, damaged or of another model, or a device that is missing or too small.
    pub(super) fn load(
        options: &Options,
        pair: Option<(ParameterDrop, PairOptions)>,
    ) -> Result<Self> {
        let mut files = LlmFiles::open(&options.model.path()?)?;
        files.quantize = options.model.quantize;
        let defaults = defaults(&files.files)?;
        let stop_ids = stop_ids(&files, &defaults);
        let tokenizer = Arc::clone(&files.tokenizer);
        let grammars = GrammarCache::new(tokenizer, files.config.vocab_size, &stop_ids)?;
        let backend = backend::open(options.model.backend(), options.model.device)?;
        let Loaded {
            engine,
            pair,
            device,
            context,
            sizes,
        } = match pair {
            None => load(options, files, backend)?,
            Some((drop, pair)) => load_pair(options, files, backend, drop, &pair)?,
        };
        tracing::info!(
            backend = device.backend,
            device = device.name,
            context,
            sequences = sizes.sequences,
            blocks = sizes.blocks,
            "the model is loaded"
        );
        Ok(Self {
            engine,
            grammars,
            stop_ids,
            defaults,
            context,
            sizes,
            pair,
        })
    }

    /// What the parameters of a pair do. It may wait for a step.
    pub(super) fn sample(&self) -> Option<Sample> {
        let pair = self.pair.as_ref()?;
        Some(Sample {
            parameters: pair.parameters(),
            paired: pair.is_paired(),
        })
    }
}

/// A model with its engine, alone or as one of a pair.
struct Loaded {
    engine: EngineHandle,
    pair: Option<Pair>,
    device: Device,
    context: usize,
    sizes: EngineSizes,
}

fn defaults(files: &ModelFiles) -> Result<SamplingDefaults> {
    // A GGUF has no such file.
    let ModelFiles::Folder(folder) = files else {
        return Ok(SamplingDefaults::default());
    };
    Ok(SamplingDefaults::from_folder(folder)?.unwrap_or_default())
}

/// Tokens that end an answer: those of the tokenizer, of `config.json` and of `generation_config.json`, as a server has them.
fn stop_ids(files: &LlmFiles, defaults: &SamplingDefaults) -> Vec<u32> {
    let mut ids = files.stop_ids();
    let vocabulary = files.config.vocab_size;
    let more = defaults.eos_token_ids.iter().copied();
    ids.extend(more.filter(|id| (*id as usize) < vocabulary));
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// What the flags say of sizes and memory.
fn planner(options: &Options, files: &LlmFiles, device: &Device) -> Result<MemoryPlanner> {
    let engine = &options.engine;
    Ok(MemoryPlanner {
        sequences: engine.max_num_seqs,
        context: engine.context(&files.config)?,
        prefill_chunk: engine.prefill_chunk()?,
        checkpoints: engine.checkpoints(),
        blocks: engine.num_gpu_blocks_override,
        speculative: 0,
        memory: device.memory_bytes.map(|bytes| engine.part(bytes)),
        weights: files.checkpoint()?.total_bytes(),
        degrees: Parallelism::SINGLE,
        cache: engine.cache().unwrap_or(device.cache),
    })
}

/// Options of an engine of these sizes.
fn engine_options(
    options: &Options,
    files: &LlmFiles,
    device: &Device,
    planner: &MemoryPlanner,
    sizes: &EngineSizes,
) -> EngineOptions {
    let engine = &options.engine;
    // On a CPU the model and the swap space share the host's memory; with a GPU the swap space has all of it.
    let left = match device.backend {
        "cpu" => planner.left(&files.config, sizes),
        _ => host_memory().map(|memory| engine.part(memory)),
    };
    let wanted = engine.swap_bytes();
    EngineOptions {
        host_bytes: left.map_or(wanted, |left| wanted.min(left)),
        queue: engine.max_queue,
        ..EngineOptions::default()
    }
}

/// A line in the log for each tenth of the weights.
fn progress() -> impl FnMut(u64, u64) -> ControlFlow<()> {
    let mut told = 0;
    move |done, total| {
        let tenth = done * 10 / total.max(1);
        if tenth > told {
            told = tenth;
            tracing::info!("loading: {} of {} MB", done / 1_000_000, total / 1_000_000);
        }
        ControlFlow::Continue(())
    }
}

fn load(options: &Options, files: LlmFiles, backend: Box<dyn Backend>) -> Result<Loaded> {
    let device = backend.device();
    let planner = planner(options, &files, device)?;
    let sizes = planner.sizes(&files.config)?;
    let llm_options = LlmOptions {
        sizes,
        cache: options.engine.cache(),
        engine: engine_options(options, &files, device, &planner, &sizes),
    };
    let llm = files.load(backend, &llm_options, &mut progress())?;
    let (device, context) = (llm.device().clone(), llm.context());
    let (_, engine) = llm.into_parts();
    Ok(Loaded {
        engine,
        pair: None,
        device,
        context,
        sizes,
    })
}

/// The same as one of a pair.
fn load_pair(
    options: &Options,
    files: LlmFiles,
    backend: Box<dyn Backend>,
    drop: ParameterDrop,
    pair: &PairOptions,
) -> Result<Loaded> {
    let device = backend.device();
    let planner = planner(options, &files, device)?;
    let sizes = planner.sizes(&files.config)?;
    let replica = DataParallelOptions {
        planner,
        engine: engine_options(options, &files, device, &planner, &sizes),
        drop,
        automatic: true,
    };
    let loaded = files.load_pair(backend, &replica, pair, &mut progress())?;
    let states = &loaded.states;
    tracing::info!(
        "slots and blocks: {:?}, and when parameters are dropped {:?}",
        states.whole,
        states.dropped.values().next()
    );
    if let Some(address) = loaded.pair.address() {
        tracing::info!("the other worker of the pair connects to {address}");
    }
    Ok(Loaded {
        engine: loaded.engine,
        pair: Some(loaded.pair),
        device: loaded.device,
        context: loaded.context,
        sizes: loaded.sizes,
    })
}
