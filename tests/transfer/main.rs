//! Transfers of caches: out of one engine layer by layer while a prompt is prefilled, into another in any order.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "../common/backends.rs"]
mod backends;
#[cfg(feature = "cuda")]
#[path = "../common/emulated.rs"]
mod emulated;
#[path = "../engine_harness/mod.rs"]
mod engine_harness;
mod export;
#[path = "../common/group.rs"]
mod group;
mod hand_off;
mod import;
mod resizes;
#[path = "../common/seeds.rs"]
mod seeds;
#[path = "../common/wrapped.rs"]
mod wrapped;

use std::ops::ControlFlow;

use backends::{BACKENDS, Open, cpu};
use engine_harness::{
    OPTIONS, Outcome, Outcomes, engine_as, engine_on, limits, request, take, tokens,
};
use kimi_linear::cache::{CacheHeader, LayerRecord};
use kimi_linear::config::Dtype;
use kimi_linear::engine::{Engine, EngineHandle, HandOff, Request, Sink};
use kimi_linear::model::Limits;

/// Tokens whose caches are transferred: several segments, the last of which ends inside a block.
const LENGTH: usize = 165;

/// Bound on differences of log-probabilities between two f32 backends.
const F32: f32 = 1e-4;

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

fn on(open: Open, name: &str) -> Engine {
    engine_on(open(), name, limits(2, 5, 40), OPTIONS)
}

/// The same with latents in this dtype.
fn with_pool(open: Open, name: &str, cache: Dtype) -> Engine {
    let limits = Limits {
        cache,
        ..limits(2, 5, 40)
    };
    engine_as(open(), name, limits, OPTIONS)
}

fn prompt() -> Vec<u32> {
    tokens(1, LENGTH)
}

/// The continuation from the caches, computed on the same engine: cut where they end, so that the arithmetic is the same.
fn further() -> Request {
    Request {
        turn_ends: vec![LENGTH],
        ..request([prompt(), tokens(2, 9)].concat(), 8)
    }
}

/// All records of an export, and their header.
fn exported(engine: Engine) -> (CacheHeader, Vec<LayerRecord>) {
    let handle = EngineHandle::start(engine).unwrap();
    let (header, records, _) = sent(&handle, request(prompt(), 0));
    (header, records)
}

/// The content of an export: header, all records, and the hand-off.
fn sent(handle: &EngineHandle, request: Request) -> (CacheHeader, Vec<LayerRecord>, HandOff) {
    let mut stream = handle.export(request, unheard()).unwrap();
    let header = stream.header().clone();
    let records = stream.by_ref().map(|record| record.unwrap()).collect();
    (header, records, stream.hand_off().unwrap().clone())
}

/// A sink of events that discards them.
fn unheard() -> Sink {
    Box::new(|_| ControlFlow::Continue(()))
}

fn outcome(answer: &kimi_linear::engine::Answer) -> Outcome {
    let mut outcomes = Outcomes::new();
    while let Some(event) = answer.next() {
        take([(answer.id(), event)], &mut outcomes);
    }
    outcomes.remove(&(answer.id(), 0)).unwrap()
}

/// Imports the records as they are, and answers.
fn imported(engine: Engine, header: &CacheHeader, records: &[LayerRecord]) -> Outcome {
    let handle = EngineHandle::start(engine).unwrap();
    let mut import = handle.import(header.clone(), further()).unwrap();
    for record in records {
        import.put(record).unwrap();
    }
    outcome(&import.finish(None).unwrap())
}

fn near(expected: &Outcome, found: &Outcome) {
    assert_eq!(expected.tokens, found.tokens);
    for (a, b) in expected.logprobs.iter().zip(&found.logprobs) {
        let (a, b) = (a.as_ref().unwrap().logprob, b.as_ref().unwrap().logprob);
        assert!((a - b).abs() <= F32, "{a} and {b}");
    }
}
