//! Steps that are submitted before the tokens of the step before them are known: answers, log-probabilities and what is cached
//! have the same bits, and what was computed for nothing leaves nothing behind.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::engine_harness::{
    BLOCK, OPTIONS, Outcomes, answer, collect, drawn, engine_on, finish, limits, request, tokens,
};
use crate::wrapped::{Part, Wrap, Wrapped};
use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::backend::{Backend, Batch, Op, Result};
use kimi_linear::engine::{
    Engine, EngineOptions, Event, FinishReason, Request, RequestId, Sampling,
};
use kimi_linear::error::BackendError;
use pollster::block_on;

/// Reports a backend as asynchronous, and counts the tokens that are fed.
#[derive(Clone, Default)]
pub struct Asynchronous(Arc<AtomicUsize>);

impl Asynchronous {
    /// Number of fed tokens so far.
    pub fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

impl Wrap for Asynchronous {
    fn parts(&mut self, op: &Op, _backend: &mut dyn Backend) -> Result<Vec<Part>> {
        Ok(vec![Part::plain(op.clone())])
    }

    fn batch(&self, batch: &mut Batch) -> Result<()> {
        self.0.fetch_add(batch.fed.len(), Ordering::Relaxed);
        Ok(())
    }

    fn is_asynchronous(&self) -> bool {
        true
    }
}

/// The CPU as an asynchronous device.
fn cpu() -> (Box<dyn Backend>, Asynchronous) {
    over(Box::new(CpuBackend::new()))
}

fn over(backend: Box<dyn Backend>) -> (Box<dyn Backend>, Asynchronous) {
    let fed = Asynchronous::default();
    (Box::new(Wrapped::new(backend, fed.clone())), fed)
}

const WAITING: EngineOptions = EngineOptions {
    async_scheduling: false,
    ..OPTIONS
};

/// Answers of one token and of many, greedy and drawn, some of which a stop token ends.
fn requests() -> Vec<Request> {
    let mut alone = engine_on(
        Box::new(CpuBackend::new()),
        "tiny-a",
        limits(1, 4, 32),
        WAITING,
    );
    [15, 31, 14, 33, 1, 48, 20]
        .into_iter()
        .enumerate()
        .map(|(i, length)| {
            let sampling = match i % 3 {
                0 => Sampling::GREEDY,
                1 => drawn(i as u64),
                _ => Sampling {
                    top_k: 40,
                    logit_bias: vec![(7, 2.0), (300, -3.0)],
                    ..drawn(i as u64)
                },
            };
            let whole = Request {
                sampling,
                ..request(tokens(i as u64 + 1, length), 1 + 6 * i)
            };
            let answer = answer(&mut alone, whole.clone()).tokens;
            // The token in the middle of the answer ends it where it comes first.
            let stop_ids = match i % 2 {
                0 => vec![answer[answer.len() / 2]],
                _ => Vec::new(),
            };
            Request { stop_ids, ..whole }
        })
        .collect()
}

/// Runs all requests at once, and then one that continues each answer.
fn run(backend: Box<dyn Backend>, options: EngineOptions) -> (Outcomes, Vec<usize>) {
    let mut engine = engine_on(backend, "tiny-a", limits(4, 12, 40), options);
    let mut outcomes = Outcomes::new();
    let requests = requests();
    for (i, request) in requests.iter().enumerate() {
        engine.submit(RequestId(i as u64), request.clone()).unwrap();
    }
    finish(&mut engine, &mut outcomes);
    let mut cached = Vec::new();
    for (i, first) in requests.iter().enumerate() {
        let said = outcomes[&(RequestId(i as u64), 0)].tokens.clone();
        let prompt = [first.prompt.clone(), said, tokens(50 + i as u64, 4)].concat();
        let id = RequestId(100 + i as u64);
        engine.submit(id, request(prompt, 3)).unwrap();
        finish(&mut engine, &mut outcomes);
        cached.push(outcomes[&(id, 0)].usage.cached_tokens);
    }
    engine.clear_cache();
    let left = engine.occupancy();
    assert_eq!((left.slots, left.blocks, left.host_bytes), (0, 0, 0));
    assert_eq!(engine.held(), (0, 0));
    (outcomes, cached)
}

fn same_answers(open: impl Fn() -> Box<dyn Backend>) {
    let (ahead, fed) = over(open());
    let ahead = run(ahead, OPTIONS);
    assert!(fed.count() > 60, "{}", fed.count());
    let (waiting, fed) = over(open());
    assert_eq!(ahead, run(waiting, WAITING));
    assert_eq!(fed.count(), 0);
    let reasons = ahead
        .0
        .values()
        .filter(|one| one.reason == Some(FinishReason::Stop));
    assert!(reasons.count() >= 3);
    assert!(ahead.1.iter().all(|cached| *cached > 0), "{:?}", ahead.1);
}

#[test]
fn answers_and_what_they_leave_are_those_of_an_engine_that_waits() {
    same_answers(|| Box::new(CpuBackend::new()));
}

#[cfg(all(feature = "cuda", feature = "wgpu"))]
#[test]
fn answers_on_gpu_backends_are_those_of_an_engine_that_waits() {
    use kimi_linear::backend::cuda::CudaBackend;
    use kimi_linear::backend::wgpu;
    let run_on = |open: &dyn Fn() -> Box<dyn Backend>| {
        assert!(open().is_asynchronous());
        assert_eq!(run(open(), OPTIONS), run(open(), WAITING));
    };
    run_on(&|| {
        let backend = wgpu::WgpuBackend::with_options(wgpu::Options::default());
        Box::new(backend.unwrap_or_else(|error| {
            panic!("{error}. These tests need a Vulkan driver: apt-get install mesa-vulkan-drivers libvulkan1")
        }))
    });
    run_on(&|| {
        let machine = crate::emulated::machine(&[kimi_linear_emulated::Order::Forward]);
        Box::new(CudaBackend::over(machine))
    });
}

/// What ends an answer may come from outside too: a stop string, or a cancellation, while the next token is being computed.
#[test]
fn a_state_is_cached_without_the_token_that_was_computed_for_nothing() {
    let ends: [fn(&mut Engine); 2] = [
        |engine| engine.stop(RequestId(1), 0),
        |engine| engine.cancel(RequestId(1)),
    ];
    for end in ends {
        let after = |options| {
            let (backend, fed) = cpu();
            let mut engine = engine_on(backend, "tiny-128", limits(2, 6, 40), options);
            let prompt = tokens(3, BLOCK + 5);
            engine
                .submit(RequestId(1), request(prompt.clone(), 100))
                .unwrap();
            let mut said = Vec::new();
            while said.len() < 14 {
                block_on(engine.step());
                said.extend(engine.take_events().filter_map(|(_, event)| match event {
                    Event::Token { id, .. } => Some(id),
                    _ => None,
                }));
            }
            end(&mut engine);
            assert!(!block_on(engine.step()));
            let whole = [prompt, said].concat();
            let snapshot = block_on(engine.snapshot(&whole)).unwrap();
            (snapshot, fed.count())
        };
        let ((ahead, fed), (waiting, none)) = (after(OPTIONS), after(WAITING));
        assert!(fed >= 13 && none == 0, "{fed} {none}");
        assert!(ahead == waiting, "another state is cached");
    }
}

/// Refuses every third batch that is fed.
#[derive(Clone, Default)]
struct Short(Asynchronous);

impl Wrap for Short {
    fn parts(&mut self, op: &Op, backend: &mut dyn Backend) -> Result<Vec<Part>> {
        self.0.parts(op, backend)
    }

    fn batch(&self, batch: &mut Batch) -> Result<()> {
        if !batch.fed.is_empty() && self.0.0.fetch_add(1, Ordering::Relaxed).is_multiple_of(3) {
            let what = "a step".to_owned();
            return Err(BackendError::OutOfMemory { what, bytes: 1 });
        }
        Ok(())
    }

    fn is_asynchronous(&self) -> bool {
        true
    }
}

/// A step that cannot be submitted ahead is submitted when the tokens are known, and no request fails.
#[test]
fn a_step_that_is_refused_ahead_runs_later() {
    let short = Short::default();
    let found = run(
        Box::new(Wrapped::new(Box::new(CpuBackend::new()), short.clone())),
        OPTIONS,
    );
    assert_eq!(found, run(Box::new(CpuBackend::new()), WAITING));
    assert!(short.0.count() > 30, "{}", short.0.count());
}

/// A draw that depends on the tokens before it waits for them.
#[test]
fn penalties_wait_for_the_token_before() {
    let (backend, fed) = cpu();
    let mut engine = engine_on(backend, "tiny-a", limits(2, 6, 40), OPTIONS);
    let penalised = Request {
        sampling: Sampling {
            repetition_penalty: 1.3,
            frequency_penalty: 0.5,
            ..drawn(3)
        },
        ..request(tokens(5, 20), 20)
    };
    let mut alone = engine_on(
        Box::new(CpuBackend::new()),
        "tiny-a",
        limits(1, 4, 40),
        WAITING,
    );
    let expected = answer(&mut alone, penalised.clone());
    assert_eq!(
        answer(&mut engine, penalised.clone()).said(),
        expected.said()
    );
    assert_eq!(fed.count(), 0);
    // Beside one that need not wait, whose answer is longer.
    let mut outcomes = Outcomes::new();
    engine.submit(RequestId(1), penalised).unwrap();
    engine
        .submit(RequestId(2), request(tokens(6, 20), 40))
        .unwrap();
    finish(&mut engine, &mut outcomes);
    collect(&mut engine, &mut outcomes);
    assert_eq!(outcomes[&(RequestId(1), 0)].said(), expected.said());
    assert!(fed.count() >= 15, "{}", fed.count());
}

/// Without a slot for the second state a sequence waits: no other is preempted for it, and no cached state is in the way.
#[test]
fn a_sequence_without_a_spare_slot_waits() {
    for (slots, ahead) in [(2, false), (4, true)] {
        let (backend, fed) = cpu();
        let mut engine = engine_on(backend, "tiny-a", limits(2, slots, 40), OPTIONS);
        let mut outcomes = Outcomes::new();
        for id in 1..=2 {
            engine
                .submit(RequestId(id), request(tokens(id, 20), 30))
                .unwrap();
        }
        finish(&mut engine, &mut outcomes);
        assert_eq!(engine.preemptions(), 0);
        assert_eq!(
            fed.count() > 20,
            ahead,
            "{slots} slots, {} fed",
            fed.count()
        );
    }
}
