//! Functions that the engine's tests share: engines over the reference checkpoints, their answers, and answers computed
//! without an engine.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic
)]

#[path = "../common/mod.rs"]
pub mod common;

use std::collections::BTreeMap;
use std::ops::Range;

use common::reference;
use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::backend::{Backend, Batch, Block, Capacity, OutputRow, Segment, Slot};
use kimi_linear::checkpoint::Checkpoint;
use kimi_linear::config::{Dtype, ModelConfig};
use kimi_linear::engine::{
    Engine, EngineOptions, Event, FinishReason, Request, RequestId, Sampling, TokenLogprobs, Usage,
};
use kimi_linear::model::{Limits, Model, StepOptions};

pub const BLOCK: usize = 16;

/// Pools of this number of slots and blocks, for this number of sequences at a time.
pub fn limits(sequences: usize, slots: usize, blocks: usize) -> Limits {
    Limits {
        step: Capacity {
            tokens: 4 * BLOCK + sequences,
            segments: sequences,
            outputs: sequences.max(BLOCK),
            blocks: sequences * blocks,
            checkpoints: sequences + 1,
        },
        slots,
        blocks,
        block_tokens: BLOCK,
        cache: Dtype::F32,
    }
}

pub const OPTIONS: EngineOptions = EngineOptions {
    cut: BLOCK,
    checkpoint_blocks: 4,
    host_bytes: 64 << 20,
    quantum: 1 << 20,
    cached_steps: 16,
    async_scheduling: true,
    prompt_lookup: None,
    keep_on_device_error: false,
    queue: usize::MAX,
};

/// With latents in the backend's own dtype.
pub fn load_on(backend: Box<dyn Backend>, name: &str, limits: Limits) -> Model {
    let cache = backend.device().cache;
    load_as(backend, name, Limits { cache, ..limits })
}

/// With these limits, including the latents' dtype.
pub fn load_as(backend: Box<dyn Backend>, name: &str, limits: Limits) -> Model {
    let dir = reference(name);
    let config = ModelConfig::from_file(&dir.join("config.json")).unwrap();
    let checkpoint = Checkpoint::open(&dir, &config).unwrap();
    Model::load(&config, &checkpoint, backend, limits, &mut |_| {}).unwrap()
}

pub fn load(name: &str, limits: Limits) -> Model {
    load_on(Box::new(CpuBackend::new()), name, limits)
}

pub fn engine_on(
    backend: Box<dyn Backend>,
    name: &str,
    limits: Limits,
    options: EngineOptions,
) -> Engine {
    Engine::new(load_on(backend, name, limits), options)
}

/// With these limits, including the latents' dtype.
pub fn engine_as(
    backend: Box<dyn Backend>,
    name: &str,
    limits: Limits,
    options: EngineOptions,
) -> Engine {
    Engine::new(load_as(backend, name, limits), options)
}

pub fn engine(name: &str, limits: Limits, options: EngineOptions) -> Engine {
    engine_on(Box::new(CpuBackend::new()), name, limits, options)
}

/// One complete answer, with everything that must be equal between two runs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    pub tokens: Vec<u32>,
    pub logprobs: Vec<Option<TokenLogprobs>>,
    pub reason: Option<FinishReason>,
    pub usage: Usage,
    pub error: Option<String>,
}

impl Outcome {
    /// The model's results, without the source of its prompt.
    pub fn said(&self) -> (&[u32], Vec<u32>, Option<FinishReason>) {
        let bits = self.logprobs.iter().flatten();
        let bits =
            bits.flat_map(|l| std::iter::once(l.logprob).chain(l.top.iter().map(|top| top.1)));
        (&self.tokens, bits.map(f32::to_bits).collect(), self.reason)
    }
}

pub type Outcomes = BTreeMap<(RequestId, usize), Outcome>;

/// Adds the engine's events to the outcomes.
pub fn collect(engine: &mut Engine, outcomes: &mut Outcomes) {
    take(engine.take_events(), outcomes);
}

/// Adds these events to the outcomes.
pub fn take(events: impl IntoIterator<Item = (RequestId, Event)>, outcomes: &mut Outcomes) {
    for (id, event) in events {
        match event {
            Event::Token {
                sample,
                id: token,
                logprobs,
            } => {
                let outcome = outcomes.entry((id, sample)).or_default();
                assert!(outcome.reason.is_none(), "a token after the end");
                outcome.tokens.push(token);
                outcome.logprobs.push(logprobs);
            }
            Event::Finished {
                sample,
                reason,
                usage,
                ..
            } => {
                let outcome = outcomes.entry((id, sample)).or_default();
                assert!(outcome.reason.is_none(), "finished twice");
                outcome.reason = Some(reason);
                outcome.usage = usage;
            }
            Event::Failed(error) => {
                outcomes.entry((id, 0)).or_default().error = Some(error.to_string())
            }
            Event::Queued { .. }
            | Event::Reserved { .. }
            | Event::HandOff(_)
            | Event::Prefill { .. }
            | Event::Scored(_)
            | Event::Trace { .. } => {}
        }
    }
}

/// Runs the engine until nothing is left.
pub fn finish(engine: &mut Engine, outcomes: &mut Outcomes) {
    loop {
        let more = pollster::block_on(engine.step());
        collect(engine, outcomes);
        if !more {
            return;
        }
    }
}

/// The answers of one request that runs alone.
pub fn answers(engine: &mut Engine, request: Request) -> Vec<Outcome> {
    let mut outcomes = Outcomes::new();
    engine.submit(RequestId(u64::MAX), request).unwrap();
    finish(engine, &mut outcomes);
    outcomes.into_values().collect()
}

pub fn answer(engine: &mut Engine, request: Request) -> Outcome {
    let mut answers = answers(engine, request);
    assert_eq!(answers.len(), 1);
    answers.remove(0)
}

/// A request whose answers can be compared bit by bit.
pub fn request(prompt: Vec<u32>, max_tokens: usize) -> Request {
    Request {
        logprobs: Some(2),
        ..Request::new(prompt, max_tokens)
    }
}

pub fn drawn(seed: u64) -> Sampling {
    Sampling {
        temperature: 1.0,
        top_p: 0.9,
        seed,
        ..Sampling::GREEDY
    }
}

/// Text-like tokens, from a seed.
pub fn tokens(seed: u64, count: usize) -> Vec<u32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % 250) as u32
    };
    (0..count).map(|_| next()).collect()
}

/// The greedy continuation of `tokens` computed without an engine: the model runs exactly these segments, then one token at a
/// time.
pub fn without_engine(
    model: &mut Model,
    tokens: &[u32],
    segments: &[Range<usize>],
    count: usize,
) -> (Vec<u32>, Vec<u32>) {
    let most = model.limits().step;
    let step_options = StepOptions {
        candidates: 2,
        keep_rows: false,
        probe_hidden: false,
        draws: kimi_linear::backend::DrawCapacity::NONE,
    };
    let mut step = model.step(most, step_options).unwrap();
    let mut all = tokens.to_vec();
    let (mut answer, mut bits) = (Vec::new(), Vec::new());
    let mut at = 0;
    let mut segments = segments.iter().cloned();
    while answer.len() < count {
        let segment = segments.next().unwrap_or(at..at + 1);
        assert_eq!(segment.start, at);
        let batch = Batch {
            tokens: all[segment.clone()].to_vec(),
            segments: vec![Segment {
                length: segment.len(),
                position: at,
                slot_in: (at > 0).then_some(Slot(0)),
                slot_out: Slot(0),
                checkpoints: Vec::new(),
                blocks: (0..segment.end.div_ceil(BLOCK) as u32).map(Block).collect(),
            }],
            outputs: vec![OutputRow {
                row: segment.len() - 1,
                target: None,
            }],
            draws: Vec::new(),
            fed: Vec::new(),
        };
        let output = step.submit(&batch).unwrap().wait().unwrap();
        at = segment.end;
        if at == all.len() {
            let choice = &output.choices[0];
            let logprob = |index: usize| choice.candidates[index].1 - choice.log_normaliser;
            bits.extend([logprob(0), logprob(0), logprob(1)].map(f32::to_bits));
            answer.push(choice.candidates[0].0);
            all.push(choice.candidates[0].0);
        }
    }
    (answer, bits)
}
