//! The part of a KDA layer between its projections, which a backend may fuse, timed in layers of random weights.

use super::kernel_report::{Options, Report, Row, Time, sets};
use super::{Effort, operations, segment};
use crate::backend::{Backend, Batch, Capacity, DrawCapacity};
use crate::config::{Attention, Ffn, LayerKind, ModelConfig};
use crate::conformance::Work;
use crate::conformance::floors::Kernel;
use crate::error::Error;
use crate::model::{Limits, Model, StepOptions};

/// Tokens of a block.
const BLOCK_TOKENS: usize = 64;

/// The name of a KDA kernel in its layer: everything between the projections, fused or not.
pub(super) fn name(kernel: &Kernel) -> Option<String> {
    match kernel {
        Kernel::KdaPrefill { .. } | Kernel::KdaDecode { .. } => {
            Some(format!("{}, from convolution to norm", kernel.name()))
        }
        _ => None,
    }
}

/// The operations of a KDA layer between its projections, by their names in backends.
const LAYER: [&str; 7] = [
    "kda_block",
    "short_conv",
    "kda_gates",
    "kda_chunk",
    "kda_step",
    "kda_recurrence",
    "gated_norm",
];

/// Times those operations in layers of random weights, by the device's clock. Their results are not compared here but in the
/// conformance list.
pub(super) fn run(
    backend: Box<dyn Backend>,
    options: &Options,
    kernel: &Kernel,
    name: String,
    effort: Effort,
    report: &Report,
) -> Result<Row, Error> {
    let config = &options.config;
    let (tokens, sequences, decode) = match *kernel {
        Kernel::KdaPrefill { tokens, sequences } => (tokens, sequences, false),
        Kernel::KdaDecode { sequences } => (sequences, sequences, true),
        _ => (0, 0, false),
    };
    // The output gate is read too, and the convolution states are written; a decode also reads them.
    let conv_states = 4 * 3 * config.kda_width() * (config.short_conv_kernel_size - 1);
    let more = Work {
        bytes: (2 * tokens * config.kda_width()
            + (1 + usize::from(decode)) * sequences * conv_states) as u64,
        flops: 0,
    };
    let work = kernel.work(config).and(more);
    let sets = if decode { sets(work.bytes) } else { 1 };
    let capacity = Capacity {
        tokens,
        segments: sequences,
        outputs: 1,
        blocks: 0,
        checkpoints: 0,
    };
    let mut model = layers(backend, config, sets, capacity)?;
    let step_options = StepOptions {
        candidates: 1,
        keep_rows: false,
        probe_hidden: false,
        draws: DrawCapacity::NONE,
    };
    let mut step = model.step(capacity, step_options)?;
    let floor = report.rates.as_ref().map(|rates| work.floor(rates));
    let mut row = Row {
        name,
        operation: "kda_block",
        bytes: work.bytes,
        flops: work.flops,
        floor_seconds: floor.map(|(seconds, _)| seconds),
        bound: floor.map(|(_, bound)| bound),
        time: None,
        error: None,
        refused: None,
    };
    let length = tokens / sequences.max(1);
    let batch = Batch {
        tokens: (0..length * sequences)
            .map(|i| (i * 7919 % config.vocab_size) as u32)
            .collect(),
        segments: (0..sequences)
            .map(|i| segment(i, usize::from(decode), length, decode, Vec::new()))
            .collect(),
        outputs: Vec::new(),
        draws: Vec::new(),
        fed: Vec::new(),
    };
    let all = operations(&mut *step, &batch, effort)?;
    if all.is_empty() {
        row.refused = Some("this device reports no times".to_owned());
        return Ok(row);
    }
    let own = all
        .iter()
        .filter(|(name, _)| LAYER.contains(&name.as_str()));
    row.time = Some(Time {
        seconds: own.map(|(_, ms)| ms).sum::<f64>() / 1000.0 / sets as f64,
        clock: "timestamps",
    });
    Ok(row)
}

/// A model of `sets` KDA layers of random weights, with random caches.
fn layers(
    backend: Box<dyn Backend>,
    config: &ModelConfig,
    sets: usize,
    capacity: Capacity,
) -> Result<Model, Error> {
    let kind = LayerKind {
        attention: Attention::Kda,
        ffn: Ffn::Dense,
    };
    let layers = ModelConfig {
        layers: vec![kind; sets],
        num_hidden_layers: sets,
        ..config.clone()
    };
    let limits = Limits {
        step: capacity,
        slots: capacity.segments,
        blocks: 0,
        block_tokens: BLOCK_TOKENS,
        cache: backend.device().cache,
    };
    let mut model = Model::random(&layers, 0, backend, limits, &mut |_| {})?;
    model.fill_caches(0)?;
    Ok(model)
}
