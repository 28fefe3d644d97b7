//! `kimi-linear inspect --program`: the operations of a step, built and checked without weights and without a device.

use std::io::Write;

use anyhow::Result;
use clap::ValueEnum;
use kimi_linear::backend::dry::DryBackend;
use kimi_linear::backend::{Backend, Capacity, DrawCapacity, Op, Program};
use kimi_linear::config::ModelConfig;
use kimi_linear::engine;
use kimi_linear::model::{Limits, Model, StepOptions};

use super::super::options::CacheOptions;

/// Which step.
#[derive(Clone, Copy, ValueEnum)]
pub(super) enum Phase {
    /// One new token per sequence; --tokens sets the number of sequences (default 1).
    Decode,
    /// Several tokens of one prompt; --tokens sets how many (default 512, the engine's prefill step).
    Prefill,
}

/// Prints the program of a step.
pub(super) fn run(
    config: &ModelConfig,
    phase: Phase,
    tokens: Option<usize>,
    cache: CacheOptions,
    expand: bool,
    json: bool,
) -> Result<()> {
    let (segments, length) = match phase {
        Phase::Decode => (tokens.unwrap_or(1), 1),
        Phase::Prefill => (1, tokens.unwrap_or(engine::PREFILL_CHUNK)),
    };
    let mut program = build(config, segments, length, cache)?;
    if expand {
        // An attention's two forms share the segments of a batch by their length; the form that has none is left out.
        let has_segments = |op: &Op| match op {
            Op::MlaPrefill(op) | Op::MlaDecode(op) => op.segments.contains(length),
            _ => true,
        };
        let kept = |op: &Op| has_segments(op).then(|| op.clone()).into_iter().collect();
        program = program.expanded(|_| false).rewritten(kept);
    }
    if json {
        return super::super::print_json(&program);
    }
    let mut out = std::io::stdout().lock();
    let phase = match phase {
        Phase::Decode => "decode",
        Phase::Prefill => "prefill",
    };
    writeln!(
        out,
        "# {phase}: {segments} sequence(s), {length} token(s) each"
    )?;
    write!(out, "{program}")?;
    Ok(())
}

/// The program of a step over `segments` segments of `length` tokens, checked as every backend checks it.
fn build(
    config: &ModelConfig,
    segments: usize,
    length: usize,
    cache: CacheOptions,
) -> Result<Program> {
    let blocks = segments * length.div_ceil(engine::BLOCK_TOKENS);
    let step = Capacity {
        tokens: segments * length,
        segments,
        outputs: segments,
        blocks,
        checkpoints: 0,
    };
    let backend = DryBackend::new();
    let limits = Limits {
        step,
        slots: segments,
        blocks,
        block_tokens: engine::BLOCK_TOKENS,
        cache: cache.dtype(backend.device()),
    };
    let mut model = Model::random(config, 0, Box::new(backend), limits, &mut |_| {})?;
    let step_options = StepOptions {
        candidates: 1,
        keep_rows: false,
        probe_hidden: false,
        draws: DrawCapacity {
            draws: 1,
            ..DrawCapacity::NONE
        },
    };
    model.step(step, step_options)?;
    Ok(model.program(step_options))
}
