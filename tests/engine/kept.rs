//! Engines whose requests survive the loss of a device, or of all that it holds: they are computed again from their tokens, answers do
//! not change, and nothing is reported twice.

use std::collections::BTreeMap;

use crate::engine_harness::{
    BLOCK, OPTIONS, Outcomes, answer, drawn, engine, engine_on, finish, limits, request, take,
    tokens,
};
use crate::failing::{
    MOST_STEPS, Ran, SCARCE, SEQUENCES, all_ended, as_full_as_held, known, nothing_held, planted,
    requests,
};
use crate::faulty::{Fault, Faulty, Plan, Shared};
use crate::told::Told;
use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::cache::BlockHash;
use kimi_linear::engine::{
    Engine, EngineOptions, Event, FinishReason, PromptScores, Request, RequestId, Score, UndoWrite,
};
use kimi_linear::error::Error;
use kimi_linear::model::TraceChoice;
use pollster::block_on;

/// An engine that keeps its requests, over a device that fails as planned.
fn keeping(plan: &Shared) -> Engine {
    let options = EngineOptions {
        keep_on_device_error: true,
        ..SCARCE
    };
    let backend = Box::new(Faulty::new(Box::new(CpuBackend::new()), plan));
    engine_on(backend, "tiny-a", limits(SEQUENCES, 5, 12), options)
}

/// All requests; whenever the device is lost, it comes back empty. Returns how often.
fn run(engine: &mut Engine, plan: &Shared, ran: &mut Ran, what: &str) -> usize {
    let mut lost = 0;
    let mut waiting = (0..).zip(requests());
    for step in 0..MOST_STEPS {
        if step < 3 || step == 6 {
            for (id, request) in waiting.by_ref().take(if step < 6 { 1 } else { 9 }) {
                engine.submit(RequestId(id), request).unwrap();
            }
        }
        let more = block_on(engine.step());
        let events: Vec<_> = engine.take_events().collect();
        for (id, event) in &events {
            if let Event::Failed(error) = event {
                ran.errors.insert(*id, error.clone());
            }
        }
        take(events, &mut ran.outcomes);
        as_full_as_held(engine, what);
        if let Some(error) = engine.device_error() {
            lost += 1;
            assert!(planted(&error, Fault::Lost), "{what}: {error}");
            assert!(engine.is_stalled() && engine.status().suspended);
            let left = engine.occupancy();
            assert_eq!((left.slots, left.blocks), (0, 0), "{what}");
            // Nothing runs before it is told to go on.
            let calls = plan.lock().unwrap().calls;
            assert!(!block_on(engine.step()));
            assert_eq!(plan.lock().unwrap().calls, calls);
            *plan.lock().unwrap() = Plan::default();
            engine.resume();
        } else if !more && step > 6 {
            return lost;
        }
    }
    panic!("{what}: it does not end");
}

#[test]
fn a_loss_at_each_call_changes_no_answer() {
    let (known, plan) = (known(), Shared::default());
    let mut engine = keeping(&plan);
    let before = plan.lock().unwrap().calls;
    assert_eq!(run(&mut engine, &plan, &mut Ran::default(), "no loss"), 0);
    let calls = plan.lock().unwrap().calls - before;
    let mut losses = 0;
    for at in (0..calls).step_by(3) {
        let what = format!("a loss at call {at} of {calls}");
        *plan.lock().unwrap() = Plan::default();
        let mut engine = keeping(&plan);
        *plan.lock().unwrap() = Plan {
            fault: Some((at, Fault::Lost)),
            ..Plan::default()
        };
        let mut ran = Ran::default();
        losses += run(&mut engine, &plan, &mut ran, &what);
        assert!(ran.errors.is_empty(), "{what}: {:?}", ran.errors);
        all_ended(&ran, &known, Fault::Lost, &what);
        for ((id, sample), outcome) in &ran.outcomes {
            let expected = &known.answers[id.0 as usize][*sample];
            assert_eq!(outcome.tokens, expected.tokens, "{what}: {id:?}, {sample}");
        }
        nothing_held(&mut engine, &what);
    }
    println!("{losses} losses of {calls} calls");
    assert!(losses > 50, "{losses}");
}

/// Requests that are cancelled while nothing runs end at once, and those that come wait.
#[test]
fn what_was_kept_can_be_cancelled() {
    let plan = Shared::default();
    let mut engine = keeping(&plan);
    for (id, request) in (0..).zip(requests()) {
        engine.submit(RequestId(id), request).unwrap();
    }
    block_on(engine.step());
    plan.lock().unwrap().lost = true;
    assert!(!block_on(engine.step()));
    assert!(engine.device_error().is_some());
    let next = request(tokens(9, 21), 4);
    engine.submit(RequestId(99), next.clone()).unwrap();
    for id in 0..requests().len() as u64 {
        engine.cancel(RequestId(id));
    }
    assert!(!block_on(engine.step()));
    let mut outcomes = Outcomes::new();
    take(engine.take_events(), &mut outcomes);
    for (id, request) in (0..).zip(requests()) {
        for sample in 0..request.samples {
            let found = &outcomes[&(RequestId(id), sample)];
            assert_eq!(found.reason, Some(FinishReason::Cancelled));
        }
    }
    assert_eq!(engine.load(), (0, 1));
    *plan.lock().unwrap() = Plan::default();
    engine.resume();
    finish(&mut engine, &mut outcomes);
    let expected = answer(&mut engine_alone(), next);
    assert_eq!(outcomes[&(RequestId(99), 0)].said(), expected.said());
    nothing_held(&mut engine, "cancelled");
}

/// What is reported of a request.
#[derive(Debug, Default, PartialEq)]
struct Reported {
    tokens: Vec<u32>,
    /// The positions of each scored row.
    scored: Vec<usize>,
    likelihood: Vec<u64>,
    /// The position of each trace, and its token.
    traces: Vec<(usize, u32)>,
    prefills: Vec<usize>,
}

/// All of it, if the engine loses its caches after every `every` steps.
fn reported(engine: &mut Engine, request: Request, every: usize) -> Reported {
    let (mut reported, mut score) = (Reported::default(), Score::default());
    engine.submit(RequestId(1), request).unwrap();
    let mut done = 0;
    for step in 1.. {
        let more = block_on(engine.step());
        for (_, event) in engine.take_events() {
            match event {
                Event::Token { id, .. } => reported.tokens.push(id),
                Event::Scored(scored) => {
                    let positions = scored.first..scored.first + scored.logprobs.len();
                    reported.scored.extend(positions);
                    score.add(&scored);
                    let sum = score.negative_log_likelihood.to_bits();
                    reported.likelihood.push(sum);
                }
                Event::Trace { frame, .. } => {
                    reported.traces.push((frame.position, frame.token));
                }
                Event::Prefill { done, .. } => reported.prefills.push(done),
                Event::Failed(error) => panic!("{error}"),
                _ => {}
            }
        }
        if !more {
            break;
        }
        // As much runs between two losses as ran before the last one, and more.
        if step == done + every {
            engine.recompute_all();
            done = 2 * step;
        }
    }
    reported
        .likelihood
        .drain(..reported.likelihood.len().saturating_sub(1));
    reported
}

/// Progress, scores and traces come once, and every write that is to be undone is undone again.
#[test]
fn nothing_is_reported_twice() {
    let base = || Request {
        reuse: false,
        ..request(tokens(3, 4 * BLOCK + 5), 24)
    };
    let scores = |scores| Request { scores, ..base() };
    let traced = Request {
        trace: Some(TraceChoice::default()),
        trace_from: Some(3 * BLOCK + 2),
        ..base()
    };
    let undo = Request {
        undo: vec![UndoWrite {
            token: BLOCK + 3,
            head: None,
        }],
        ..base()
    };
    let requests = [
        ("plain", base()),
        ("scores", scores(PromptScores::Likelihoods)),
        ("traced", traced),
        ("undone", undo),
        (
            "drawn",
            Request {
                sampling: drawn(5),
                ..base()
            },
        ),
    ];
    for (name, request) in requests {
        let limits = limits(1, 4, 24);
        let mut undisturbed = engine("tiny-a", limits, OPTIONS);
        let expected = reported(&mut undisturbed, request.clone(), usize::MAX / 2);
        for every in 1..6 {
            let mut engine = engine("tiny-a", limits, OPTIONS);
            let found = reported(&mut engine, request.clone(), every);
            assert_eq!(found, expected, "{name}, every {every} steps");
        }
    }
}

/// Prefixes go with the caches that they were in, and an observer is told.
#[test]
fn an_observer_is_told_that_all_is_gone() {
    let mut engine = engine("tiny-a", limits(2, 12, 64), OPTIONS);
    let layout = engine.cache_layout();
    let model = engine.cache_header(Vec::new()).model;
    let told = Told::new(BlockHash::root(model, &layout.states, &layout.latents));
    engine.observe_cache(Box::new(told.clone()));
    let prompt = || request(tokens(1, 4 * BLOCK + 2), 4);
    let first = answer(&mut engine, prompt());
    assert!(!told.blocks().is_empty());
    engine.recompute_all();
    assert!(told.blocks().is_empty());
    let again = answer(&mut engine, prompt());
    assert_eq!((again.usage.cached_tokens, again.tokens), (0, first.tokens));
    assert!(!told.blocks().is_empty());
}

/// Exports cannot go on from tokens alone: they end with a sentence, and other requests are not affected.
#[test]
fn an_export_without_its_caches_fails() {
    let mut engine = engine("tiny-a", limits(2, 6, 48), OPTIONS);
    let mut alone = engine_alone();
    let export = request(tokens(1, 100), 0);
    let mut stream = engine.export(RequestId(1), export, 1).unwrap();
    let other = Request {
        reuse: false,
        ..request(tokens(2, 40), 12)
    };
    engine.submit(RequestId(2), other.clone()).unwrap();
    block_on(engine.step());
    engine.recompute_all();
    let mut outcomes = Outcomes::new();
    finish(&mut engine, &mut outcomes);
    let error = outcomes[&(RequestId(1), 0)].error.clone().unwrap();
    assert!(
        error.contains("the caches that were sent are gone"),
        "{error}"
    );
    let told: BTreeMap<bool, usize> = stream.by_ref().fold(BTreeMap::new(), |mut told, record| {
        *told.entry(record.is_ok()).or_default() += 1;
        told
    });
    assert_eq!(told.get(&false), Some(&1), "{told:?}");
    let found = &outcomes[&(RequestId(2), 0)];
    assert_eq!(found.said(), answer(&mut alone, other).said());
    nothing_held(&mut engine, "an export that failed");
}

fn engine_alone() -> Engine {
    engine("tiny-a", limits(1, 4, 64), OPTIONS)
}

/// An error of the device is not one of a step.
#[test]
fn errors_of_steps_fail_their_requests_as_ever() {
    let plan = Shared::default();
    let mut engine = keeping(&plan);
    engine.submit(RequestId(1), requests().remove(0)).unwrap();
    let at = plan.lock().unwrap().calls;
    plan.lock().unwrap().fault = Some((at, Fault::Refused));
    let mut ran = Ran::default();
    while block_on(engine.step()) {}
    take(engine.take_events(), &mut ran.outcomes);
    assert!(engine.device_error().is_none());
    let error = ran.outcomes[&(RequestId(1), 0)].error.clone().unwrap();
    let expected = Error::from(Fault::Refused.error()).to_string();
    assert_eq!(error, expected);
}
