//! Heads, experts and vocabulary divided among several ranks, compared with the whole model.

use std::sync::Arc;

use crate::common::{Fixture, close, reference};
use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::backend::{Backend, BackendKind, Threads, open};
use kimi_linear::checkpoint::Checkpoint;
use kimi_linear::config::{Dtype, ModelConfig};
use kimi_linear::engine::{
    Engine, EngineOptions, EngineSizes, Event, PromptScores, Request, RequestId,
};
use kimi_linear::error::Error;
use kimi_linear::model::Model;

/// The logits of a prompt on one rank, in segments of 32 tokens.
fn logits(name: &str, tokens: &[u32], backend: Box<dyn Backend>) -> Result<Vec<f32>, Error> {
    let dir = reference(name);
    let config = ModelConfig::from_file(&dir.join("config.json"))?;
    let checkpoint = Checkpoint::open(&dir, &config)?;
    let sizes = EngineSizes {
        prefill_chunk: 32,
        scored: 32,
        checkpoints: 0,
        ..EngineSizes::one(tokens.len())
    };
    let model = Model::load(
        &config,
        &checkpoint,
        backend,
        sizes.limits(Dtype::F32),
        &mut |_| {},
    )?;
    let options = EngineOptions {
        cut: 32,
        ..EngineOptions::default()
    };
    let mut engine = Engine::new(model, options);
    let request = Request {
        scores: PromptScores::Logits,
        ..Request::new(tokens.to_vec(), 0)
    };
    engine.submit(RequestId(1), request)?;
    while pollster::block_on(engine.step()) {}
    let mut logits = Vec::new();
    for (_, event) in engine.take_events() {
        if let Event::Scored(scored) = event {
            logits.extend(scored.logits);
        }
    }
    Ok(logits)
}

fn ranks<'a>(name: &'a str, tokens: &'a [u32], count: usize) -> Vec<Result<Vec<f32>, Error>> {
    std::thread::scope(|scope| {
        let run = |collective| {
            let backend = Box::new(CpuBackend::with_collective(Arc::new(collective)));
            scope.spawn(move || logits(name, tokens, backend))
        };
        let threads: Vec<_> = Threads::new(count).into_iter().map(run).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}

#[test]
fn two_ranks_compute_what_one_does() {
    for (name, n) in [("tiny-a", 65), ("tiny-128", 130)] {
        let expected = Fixture::open(&format!("{name}/expected.safetensors"));
        let tokens = expected.ids(&format!("prompt.{n}.tokens"));
        let whole = logits(name, &tokens, open(BackendKind::Cpu, None).unwrap()).unwrap();
        let parts: Vec<_> = ranks(name, &tokens, 2)
            .into_iter()
            .map(Result::unwrap)
            .collect();
        assert_eq!(parts[0], parts[1], "every rank holds the same bits");
        close(
            name,
            &parts[0],
            &expected.f32(&format!("prompt.{n}.logits")),
            1e-5,
        );
        close(name, &parts[0], &whole, 1e-5);
    }
}

#[test]
fn heads_that_do_not_divide_are_named() {
    for result in ranks("tiny-a", &[1, 2, 3], 3) {
        let message = result.unwrap_err().to_string();
        assert_eq!(
            message,
            "sharding: KDA heads should be a multiple of 3 ranks, but is 2"
        );
    }
}
