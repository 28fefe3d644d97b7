//! The cost of a trace: decode speed of one sequence with every number of the trace read back, compared with decoding without
//! a trace.
//!
//!     cargo bench --locked --bench trace -- [MODEL FOLDER] [cpu|wgpu]
//!
//! Answers with and without a trace alternate, so that other load on the machine affects both alike. The state and the
//! attention of the selected heads are read back as a whole, and every head's query, key and value, as in the desktop app.
#![allow(clippy::print_stdout, missing_docs)]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use kimi_linear::backend::{BackendKind, open};
use kimi_linear::checkpoint::Checkpoint;
use kimi_linear::config::ModelConfig;
use kimi_linear::engine::{Engine, EngineOptions, EngineSizes, Event, Request, RequestId};
use kimi_linear::model::{Model, TraceChoice, TraceHead};

const PROMPT: usize = 32;
const TOKENS: usize = 128;
const ROUNDS: usize = 15;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| !a.starts_with("--"))
        .collect();
    let reference = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/reference/tiny-128");
    let dir = arguments.first().map_or(reference, PathBuf::from);
    let kind = match arguments.get(1).map(String::as_str) {
        Some("wgpu") => BackendKind::Wgpu,
        _ => BackendKind::Cpu,
    };
    let config = ModelConfig::from_file(&dir.join("config.json"))?;
    let checkpoint = Checkpoint::open(&dir, &config)?;
    let backend = open(kind, None)?;
    println!(
        "{} on {} ({})",
        dir.display(),
        backend.device().name,
        backend.device().backend
    );
    let limits = EngineSizes::one(PROMPT + TOKENS + 1).limits(backend.device().cache);
    let model = Model::load(&config, &checkpoint, backend, limits, &mut |_| {})?;
    let mut engine = Engine::new(model, EngineOptions::default());
    let head = |layer: Option<usize>| layer.map(|layer| TraceHead { layer, head: 0 });
    let choice = TraceChoice {
        kda: head(config.kda_layers().last()),
        mla: head(config.mla_layers().last()),
        vectors: true,
    };
    let mut times = [Vec::new(), Vec::new()];
    for round in 0..2 * (ROUNDS + 1) {
        let traced = round % 2 == 1;
        let request = Request {
            trace: traced.then_some(choice),
            reuse: false,
            ..Request::new((0..PROMPT as u32).collect(), TOKENS)
        };
        let time = decode(&mut engine, RequestId(round as u64), request)?;
        // The first of each compiles its steps.
        if round > 1 {
            times[usize::from(traced)].push(time);
        }
    }
    let [plain, traced] = times.map(|mut times| {
        times.sort_unstable();
        times[times.len() / 2].as_secs_f64() * 1000.0 / (TOKENS - 1) as f64
    });
    println!(
        "{plain:.3} ms per token, {traced:.3} traced: {:.3} x (medians of {ROUNDS})",
        traced / plain
    );
    Ok(())
}

/// From the first token of an answer to its last.
fn decode(engine: &mut Engine, id: RequestId, request: Request) -> anyhow::Result<Duration> {
    engine.submit(id, request)?;
    let mut first = None;
    let mut last = None;
    while pollster::block_on(engine.step()) {
        for (_, event) in engine.take_events() {
            match event {
                Event::Token { .. } => {
                    last = Some(Instant::now());
                    first = first.or(last);
                }
                Event::Failed(error) => anyhow::bail!("{error}"),
                _ => {}
            }
        }
    }
    engine.take_events().for_each(drop);
    match (first, last) {
        (Some(first), Some(last)) => Ok(last - first),
        _ => anyhow::bail!("no token came"),
    }
}
