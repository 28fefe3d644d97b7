//! Measures a model's shape with random weights, without its checkpoint: decode over caches of any context length,
//! prompts in segments, the hybrid and the same shape with MLA in every layer.
//!
//! A context is not prefilled: states and latents are random numbers that the device generates. If all layers together exceed
//! the device's memory, one layer of each kind is measured and multiplied, and the row says so. A long prompt's segments are
//! sampled by their position, and the row says how many ran.

use std::time::Instant;

use crate::backend::{Backend, Batch, Capacity, DrawCapacity, OutputRow, Step};
use crate::config::{Dtype, LayerKind, MemoryRequest, ModelConfig};
use crate::conformance::floors::{self, Kernel, Rates};
use crate::error::{BackendError, EngineError, Error};
use crate::model::{Limits, Model, StepOptions};

use super::{Effort, Make, awaited, operations, queued, segment, table};

/// Tokens of a block.
const BLOCK_TOKENS: usize = 64;
/// The maximum number of segments of a prompt that run; the times of those in between are interpolated.
const SAMPLED: usize = 5;
/// The part of a device's memory for weights, caches and activations; the rest is for the driver and the kernels.
const USABLE: f64 = 0.93;

/// What to measure.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case", tag = "what")]
pub enum Work {
    /// One token per sequence.
    Decode {
        /// Cached tokens per sequence.
        context: usize,
        /// Sequences.
        batch: usize,
    },
    /// One prompt from an empty context.
    Prefill {
        /// Its length in tokens.
        tokens: usize,
    },
}

/// How to measure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The seed of weights and caches.
    pub seed: u32,
    /// The maximum number of tokens of a prompt in one step.
    pub prefill_chunk: usize,
    /// Measure a layer of each kind and multiply, even if the whole model fits.
    pub by_layer: bool,
    /// The dtype of the latent cache; `None` for the device's own.
    pub cache: Option<Dtype>,
    /// Repetitions; `None` to take no times.
    pub effort: Option<Effort>,
}

/// How a row was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum How {
    /// All layers at once.
    Whole,
    /// The embedding and the head alone, plus one layer of each kind times the number of layers of the kind.
    ByLayer,
}

/// One measurement.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Row {
    /// `hybrid`, `all MLA`, `all KDA` or `no layers`.
    pub variant: &'static str,
    /// The numbers of KDA and of MLA layers.
    pub layers: [usize; 2],
    /// What was measured.
    #[serde(flatten)]
    pub work: Work,
    /// Whether all layers ran at once.
    pub how: How,
    /// The prompt's segments that ran, and all its segments; `[1, 1]` for a decode.
    pub segments: [usize; 2],
    /// Seconds of one step or one prompt, each submission awaited; `None` if no times were taken.
    pub seconds: Option<f64>,
    /// Seconds of a decode whose submissions are not awaited in between: the device's busy time.
    pub busy_seconds: Option<f64>,
    /// Seconds that the host adds to a decode that is awaited: the difference of those two, 0 where it is within their noise.
    pub host_seconds: Option<f64>,
    /// Tokens per second of all sequences, or of the prompt.
    pub tokens_per_second: Option<f64>,
    /// Bytes of all weights.
    pub weight_bytes: u64,
    /// The minimum bytes of weights that the step reads.
    pub weight_bytes_read: u64,
    /// The seconds of reading those alone, if the device's rates are known.
    pub weight_seconds: Option<f64>,
    /// Bytes of the KDA states of all sequences on this device.
    pub state_bytes: u64,
    /// Bytes of the latents of all sequences on this device.
    pub latent_bytes: u64,
    /// The minimum bytes of the step (bf16 weights and latents).
    pub floor_bytes: u64,
    /// The minimum seconds, if the device's rates are known.
    pub floor_seconds: Option<f64>,
    /// Milliseconds by operation, by the device's clock.
    pub operations: Vec<(String, f64)>,
}

impl Row {
    /// The speed relative to reading the weights alone; `None` for a prompt, which is not limited by that.
    #[must_use]
    pub fn of_weights(&self) -> Option<f64> {
        let decode = matches!(self.work, Work::Decode { .. });
        Some(self.weight_seconds? / self.seconds?).filter(|_| decode)
    }

    /// The speed relative to the floor's.
    #[must_use]
    pub fn of_floor(&self) -> Option<f64> {
        Some(self.floor_seconds? / self.seconds?)
    }
}

/// The name of a variant.
fn variant(config: &ModelConfig) -> &'static str {
    match (config.kda_layers().count(), config.mla_layers().count()) {
        (0, 0) => "no layers",
        (0, _) => "all MLA",
        (_, 0) => "all KDA",
        _ => "hybrid",
    }
}

/// Progress.
#[derive(Clone, Copy, Debug)]
pub enum Tell<'a> {
    /// A model of this number of bytes is about to be generated.
    Making(u64),
    /// This number of its bytes is generated.
    Made(u64),
    /// A measurement begins.
    Measuring(&'a str),
}

/// Measures one row.
///
/// # Errors
/// Too little memory for one layer, a backend that cannot generate random numbers, or logits that are not finite.
pub fn measure(
    make: Make<'_>,
    config: &ModelConfig,
    work: &Work,
    options: &Options,
    tell: &mut dyn FnMut(Tell<'_>),
) -> Result<Row, Error> {
    let backend = make()?;
    let device = backend.device().clone();
    let cache = options.cache.unwrap_or(device.cache);
    let whole = fits(config, work, options, cache, device.memory_bytes);
    let how = if options.by_layer || !whole {
        How::ByLayer
    } else {
        How::Whole
    };
    let whole = match how {
        How::Whole => match run(backend, config, work, options, tell) {
            // A device that does not report its memory size may run out.
            Err(Error::Backend(BackendError::OutOfMemory { .. })) => None,
            came => Some(came?),
        },
        How::ByLayer => {
            drop(backend);
            None
        }
    };
    let (how, measured) = match whole {
        Some(measured) => (How::Whole, measured),
        None => {
            let sum = by_layer(make, config, work, options, tell)?;
            (How::ByLayer, sum)
        }
    };
    let rates = Rates::of(&device.name);
    Ok(row(config, work, how, measured, rates.as_ref(), cache))
}

/// Whether all layers fit into `memory` bytes; true if the device does not report its memory.
#[must_use]
pub fn fits(
    config: &ModelConfig,
    work: &Work,
    options: &Options,
    cache: Dtype,
    memory: Option<u64>,
) -> bool {
    let (context, sequences) = held(work);
    let request = MemoryRequest {
        context,
        sequences,
        spare_slots: 0,
        weights: config.weight_bytes(Dtype::Bf16),
        cache,
        conv_states: Dtype::F32,
        block_tokens: BLOCK_TOKENS,
        step_tokens: step_tokens(work, options),
    };
    let needed = config.memory(&request).total() as f64;
    memory.is_none_or(|bytes| needed <= bytes as f64 * USABLE)
}

/// Tokens per sequence, and the number of sequences.
fn held(work: &Work) -> (usize, usize) {
    match *work {
        Work::Decode { context, batch } => (context.max(1), batch),
        Work::Prefill { tokens } => (tokens, 1),
    }
}

fn step_tokens(work: &Work, options: &Options) -> usize {
    match *work {
        Work::Decode { batch, .. } => batch,
        Work::Prefill { tokens } => tokens.min(options.prefill_chunk),
    }
}

/// The result of a run.
struct Measured {
    seconds: Option<f64>,
    busy: Option<f64>,
    segments: [usize; 2],
    operations: Vec<(String, f64)>,
}

/// The embedding and the head alone, plus each kind of layer alone minus those, times its number of layers.
fn by_layer(
    make: Make<'_>,
    config: &ModelConfig,
    work: &Work,
    options: &Options,
    tell: &mut dyn FnMut(Tell<'_>),
) -> Result<Measured, Error> {
    let mut kinds: Vec<(LayerKind, usize)> = Vec::new();
    for layer in &config.layers {
        match kinds.iter_mut().find(|(kind, _)| kind == layer) {
            Some((_, count)) => *count += 1,
            None => kinds.push((*layer, 1)),
        }
    }
    let with = |layers: Vec<LayerKind>| ModelConfig {
        num_hidden_layers: layers.len(),
        layers,
        ..config.clone()
    };
    let mut sum = run(make()?, &with(Vec::new()), work, options, tell)?;
    let (seconds, busy) = (sum.seconds, sum.busy);
    let base = sum.operations.clone();
    for (kind, count) in kinds {
        let one = run(make()?, &with(vec![kind]), work, options, tell)?;
        let count = count as f64;
        let more = |sum: Option<f64>, one: Option<f64>, base: Option<f64>| {
            Some(sum? + count * (one? - base?).max(0.0))
        };
        sum.segments = one.segments;
        sum.seconds = more(sum.seconds, one.seconds, seconds);
        sum.busy = more(sum.busy, one.busy, busy);
        for (name, ms) in one.operations {
            let before = base.iter().find(|(other, _)| *other == name);
            let more = count * (ms - before.map_or(0.0, |(_, ms)| *ms)).max(0.0);
            match sum.operations.iter_mut().find(|(other, _)| *other == name) {
                Some((_, ms)) => *ms += more,
                None => sum.operations.push((name, more)),
            }
        }
    }
    Ok(sum)
}

/// Generates a model and runs it.
fn run(
    backend: Box<dyn Backend>,
    config: &ModelConfig,
    work: &Work,
    options: &Options,
    tell: &mut dyn FnMut(Tell<'_>),
) -> Result<Measured, Error> {
    let (context, sequences) = held(work);
    let rows = step_tokens(work, options);
    let blocks = sequences * context.div_ceil(BLOCK_TOKENS);
    let capacity = Capacity {
        tokens: rows,
        segments: sequences,
        outputs: sequences,
        blocks,
        checkpoints: 0,
    };
    let limits = Limits {
        step: capacity,
        slots: sequences,
        blocks,
        block_tokens: BLOCK_TOKENS,
        cache: options.cache.unwrap_or(backend.device().cache),
    };
    tell(Tell::Making(config.weight_bytes(Dtype::Bf16)));
    let mut model = Model::random(config, options.seed, backend, limits, &mut |bytes| {
        tell(Tell::Made(bytes));
    })?;
    model.fill_caches(options.seed)?;
    tell(Tell::Measuring(&name(config, work)));
    let step_options = StepOptions {
        candidates: 1,
        keep_rows: false,
        probe_hidden: false,
        draws: DrawCapacity::NONE,
    };
    let mut step = model.step(capacity, step_options)?;
    match *work {
        Work::Decode { context, batch } => {
            let batch = decode(config, context.max(1), batch);
            run_decode(&mut *step, &batch, options.effort)
        }
        Work::Prefill { tokens } => run_prefill(&mut *step, config, tokens, options),
    }
}

/// Runs one decode step.
fn run_decode(
    step: &mut dyn Step,
    batch: &Batch,
    effort: Option<Effort>,
) -> Result<Measured, Error> {
    finite(&step.submit(batch)?.wait()?)?;
    let mut measured = Measured {
        seconds: None,
        busy: None,
        segments: [1, 1],
        operations: Vec::new(),
    };
    if let Some(effort) = effort {
        measured.seconds = Some(awaited(step, batch, effort)?);
        measured.busy = Some(queued(step, batch, effort)?);
        measured.operations = operations(step, batch, effort)?;
        // The states have been decayed and written many times by now.
        finite(&step.submit(batch)?.wait()?)?;
    }
    Ok(measured)
}

/// Runs the sampled segments of a prompt.
fn run_prefill(
    step: &mut dyn Step,
    config: &ModelConfig,
    tokens: usize,
    options: &Options,
) -> Result<Measured, Error> {
    let places = places(tokens, options.prefill_chunk);
    let chosen = sample(places.len());
    let mut times = Vec::new();
    for &number in &chosen {
        let (position, length) = places[number];
        let batch = prompt(config, position, length);
        finite(&step.submit(&batch)?.wait()?)?;
        if options.effort.is_some() {
            // One run is enough for a long segment: the run before has compiled and loaded everything.
            let start = Instant::now();
            step.submit(&batch)?.wait()?;
            times.push((number, start.elapsed().as_secs_f64()));
        }
    }
    let operations = match (options.effort, chosen.last()) {
        (Some(_), Some(&last)) => {
            let (position, length) = places[last];
            let batch = prompt(config, position, length);
            operations(step, &batch, Effort::least())?
        }
        _ => Vec::new(),
    };
    Ok(Measured {
        seconds: options.effort.map(|_| between(&times)),
        busy: None,
        segments: [chosen.len(), places.len()],
        operations,
    })
}

fn name(config: &ModelConfig, work: &Work) -> String {
    let variant = variant(config);
    match *work {
        Work::Decode { context, batch } => format!(
            "{variant}: decode over {} tokens, batch {batch}",
            floors::tokens_name(context)
        ),
        Work::Prefill { tokens } => {
            format!("{variant}: prefill of {}", floors::tokens_name(tokens))
        }
    }
}

/// A time of NaN logits is not a measurement.
fn finite(output: &crate::backend::StepOutput) -> Result<(), Error> {
    if !output.choices.is_empty() && output.choices.iter().all(|choice| choice.finite) {
        return Ok(());
    }
    Err(Error::Engine(EngineError::NonFinite {
        place: "the logits of random weights".to_owned(),
        blame: "so a time would be meaningless".to_owned(),
    }))
}

/// One token per sequence, at the end of its context.
fn decode(config: &ModelConfig, context: usize, sequences: usize) -> Batch {
    let token = |i: usize| ((i * 7919 + 1) % config.vocab_size) as u32;
    Batch {
        tokens: (0..sequences).map(token).collect(),
        segments: (0..sequences)
            .map(|i| segment(i, context - 1, 1, true, table(i, context, BLOCK_TOKENS)))
            .collect(),
        outputs: (0..sequences)
            .map(|row| OutputRow { row, target: None })
            .collect(),
        draws: Vec::new(),
        fed: Vec::new(),
    }
}

/// A segment of a prompt, with the logits of its last token.
fn prompt(config: &ModelConfig, position: usize, length: usize) -> Batch {
    let token = |i: usize| ((i * 7919 + 1) % config.vocab_size) as u32;
    let blocks = table(0, position + length, BLOCK_TOKENS);
    Batch {
        tokens: (position..position + length).map(token).collect(),
        segments: vec![segment(0, position, length, position > 0, blocks)],
        outputs: vec![OutputRow {
            row: length - 1,
            target: None,
        }],
        draws: Vec::new(),
        fed: Vec::new(),
    }
}

/// Position and length of each segment of a prompt.
fn places(tokens: usize, segment: usize) -> Vec<(usize, usize)> {
    (0..tokens)
        .step_by(segment.max(1))
        .map(|position| (position, segment.max(1).min(tokens - position)))
        .collect()
}

/// Which of `count` segments run: all, or equally spaced ones that include the first and the last.
fn sample(count: usize) -> Vec<usize> {
    if count <= SAMPLED {
        return (0..count).collect();
    }
    (0..SAMPLED)
        .map(|i| i * (count - 1) / (SAMPLED - 1))
        .collect()
}

/// The sum over all segments, of which some were measured. The times of the others are interpolated linearly, because the cost
/// of attention grows linearly with the context.
fn between(times: &[(usize, f64)]) -> f64 {
    let first = times.first().map_or(0.0, |(_, seconds)| *seconds);
    let gaps = times.windows(2).map(|pair| {
        let ((from, first), (to, last)) = (pair[0], pair[1]);
        let steps = (to - from) as f64;
        // The segments after the first, up to the last.
        (1..=to - from)
            .map(|i| first + (last - first) * i as f64 / steps)
            .sum::<f64>()
    });
    first + gaps.sum::<f64>()
}

/// What the host adds to a step of `seconds` that keeps the device busy for `busy` of them.
fn host_adds(seconds: Option<f64>, busy: Option<f64>) -> Option<f64> {
    Some((seconds? - busy?).max(0.0))
}

fn row(
    config: &ModelConfig,
    work: &Work,
    how: How,
    measured: Measured,
    rates: Option<&Rates>,
    cache: Dtype,
) -> Row {
    let (context, sequences) = held(work);
    let (least, read, tokens) = match *work {
        Work::Decode { context, batch } => {
            let kernel = Kernel::Step {
                context,
                sequences: batch,
            };
            let read = floors::weights_read(config, batch).bytes;
            (kernel.work(config), read, batch)
        }
        Work::Prefill { tokens } => {
            let read = config.weight_bytes(Dtype::Bf16);
            (floors::prompt(config, tokens), read, tokens)
        }
    };
    Row {
        variant: variant(config),
        layers: [config.kda_layers().count(), config.mla_layers().count()],
        work: work.clone(),
        how,
        segments: measured.segments,
        seconds: measured.seconds,
        busy_seconds: measured.busy,
        host_seconds: host_adds(measured.seconds, measured.busy),
        tokens_per_second: measured.seconds.map(|seconds| tokens as f64 / seconds),
        weight_bytes: config.weight_bytes(Dtype::Bf16),
        weight_bytes_read: read,
        weight_seconds: rates.map(|rates| read as f64 / rates.bytes_per_second),
        state_bytes: config.kda_state_bytes(Dtype::F32) * sequences as u64,
        latent_bytes: config.latent_bytes_per_token(cache) * (context * sequences) as u64,
        floor_bytes: least.bytes,
        floor_seconds: rates.map(|rates| least.floor(rates).0),
        operations: measured.operations,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sampled_segments_sum_to_all_where_time_grows_evenly() {
        let time = |number: usize| 2.0 + 0.5 * number as f64;
        for count in [1, 2, 5, 6, 100, 128] {
            let chosen = sample(count);
            assert!(chosen.len() <= SAMPLED && chosen[0] == 0);
            assert_eq!(*chosen.last().unwrap(), count - 1);
            let times: Vec<_> = chosen.iter().map(|&i| (i, time(i))).collect();
            let all: f64 = (0..count).map(time).sum();
            assert!((between(&times) - all).abs() < 1e-9 * all, "{count}");
        }
    }

    #[test]
    fn the_host_adds_what_the_device_is_not_busy() {
        assert_eq!(host_adds(Some(1.5), Some(1.25)), Some(0.25));
        assert_eq!(host_adds(Some(1.0), Some(1.25)), Some(0.0));
        assert_eq!(host_adds(Some(1.0), None), None);
    }

    #[test]
    fn segments_cover_a_prompt() {
        assert_eq!(places(10, 4), [(0, 4), (4, 4), (8, 2)]);
        assert_eq!(places(3, 4), [(0, 3)]);
    }
}
