//! A device that fails at each of its calls: no panic, no hang, every request ends with an event, no slot and no block leaks,
//! and the engine serves the next request unless the device is lost.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::Arc;

use crate::engine_harness::{
    BLOCK, OPTIONS, Outcome, Outcomes, answer, answers, drawn, engine, engine_on, limits, request,
    take, tokens,
};
use crate::faulty::{Fault, Faulty, Plan, Shared};
use crate::group::{group, offloaded};
use kimi_linear::backend::Backend;
use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::engine::{Engine, EngineOptions, Event, Request, RequestId};
use kimi_linear::error::{EngineError, Error};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

/// More steps than any schedule here needs: a schedule that needs more hangs.
pub const MOST_STEPS: usize = 2000;

/// Host memory for a part of what is evicted from the device, and a quantum after which sequences yield.
pub const SCARCE: EngineOptions = EngineOptions {
    host_bytes: 60_000,
    quantum: 5,
    checkpoint_blocks: 1,
    ..OPTIONS
};

/// Sequences that run at a time.
pub const SEQUENCES: usize = 3;

/// Few sequences at a time, and pools that are too small for all requests.
fn scarce(plan: &Shared) -> Engine {
    let backend = Box::new(Faulty::new(Box::new(CpuBackend::new()), plan));
    engine_on(backend, "tiny-a", limits(SEQUENCES, 5, 12), SCARCE)
}

/// Requests with a common prefix, one with several answers, one that is cut inside a block.
pub fn requests() -> Vec<Request> {
    let common = tokens(1, 2 * BLOCK);
    let with = |seed, count| [common.clone(), tokens(seed, count)].concat();
    vec![
        request(with(2, 5), 12),
        Request {
            samples: 2,
            sampling: drawn(7),
            ..request(with(3, 9), 8)
        },
        Request {
            reuse: false,
            ..request(tokens(4, 3 * BLOCK + 3), 9)
        },
        request(with(2, 7), 14),
        Request {
            turn_ends: vec![20],
            ..request(with(5, 1), 6)
        },
    ]
}

/// The result of one run of the schedule.
pub struct Ran {
    pub outcomes: Outcomes,
    /// The error of each request that failed.
    pub errors: BTreeMap<RequestId, Arc<Error>>,
    snapshot: Result<(), Error>,
}

impl Default for Ran {
    fn default() -> Self {
        Self {
            outcomes: Outcomes::new(),
            errors: BTreeMap::new(),
            snapshot: Ok(()),
        }
    }
}

/// Steps the engine until it is idle or has had `most` steps.
pub fn steps(engine: &mut Engine, ran: &mut Ran, most: usize) -> bool {
    for _ in 0..most {
        let more = pollster::block_on(engine.step());
        let events: Vec<_> = engine.take_events().collect();
        for (id, event) in &events {
            if let Event::Failed(error) = event {
                ran.errors.insert(*id, Arc::clone(error));
            }
        }
        take(events, &mut ran.outcomes);
        if !more {
            return true;
        }
    }
    false
}

/// All requests, the last of them after some steps, then a snapshot of the cache.
fn run(engine: &mut Engine) -> Ran {
    let mut ran = Ran::default();
    let mut waiting = (0..).zip(requests());
    for (id, request) in waiting.by_ref().take(3) {
        engine.submit(RequestId(id), request).unwrap();
    }
    steps(engine, &mut ran, 6);
    for (id, request) in waiting {
        engine.submit(RequestId(id), request).unwrap();
    }
    assert!(steps(engine, &mut ran, MOST_STEPS), "it does not end");
    ran.snapshot = pollster::block_on(engine.snapshot(&requests()[0].prompt)).map(|_| ());
    ran
}

/// The answers with a device that never fails: to the requests, and to the one after them.
pub struct Known {
    pub answers: Vec<Vec<Outcome>>,
    next: Outcome,
}

/// A request after the schedule; without a cached prefix, so that its answer is known to the bit.
fn next() -> Request {
    Request {
        reuse: false,
        ..request(tokens(9, 21), 4)
    }
}

pub fn known() -> Known {
    let mut alone = engine("tiny-a", limits(1, 4, 64), OPTIONS);
    let answers = requests()
        .into_iter()
        .map(|request| answers(&mut alone, request))
        .collect();
    let next = answer(&mut alone, next());
    Known { answers, next }
}

/// Whether this is the injected error.
pub fn planted(error: &Error, fault: Fault) -> bool {
    matches!(error, Error::Backend(found) if *found == fault.error())
}

/// Every answer of every request has ended: with the injected error, with the engine's error for damaged numbers, or as with
/// a device that never fails.
pub fn all_ended(ran: &Ran, known: &Known, fault: Fault, what: &str) {
    for (id, request) in (0..).map(RequestId).zip(requests()) {
        if let Some(error) = ran.errors.get(&id) {
            let damaged = matches!(**error, Error::Engine(EngineError::NonFinite { .. }));
            assert!(damaged || planted(error, fault), "{what}: {error}");
            continue;
        }
        for sample in 0..request.samples {
            let what = format!("{what}: {id:?}, sample {sample}");
            let outcome = ran.outcomes.get(&(id, sample)).expect(&what);
            let expected = &known.answers[id.0 as usize][sample];
            assert_eq!(outcome.reason, expected.reason, "{what}");
            // Whether a prefix is found in the cache depends on what ran before, and so do the last bits.
            if !request.reuse {
                assert_eq!(outcome.said(), expected.said(), "{what}");
            }
        }
    }
}

/// The usage of the pools matches the living sequences: everything else belongs to the prefix cache.
pub fn as_full_as_held(engine: &Engine, what: &str) {
    let found = engine.occupancy();
    let used = (
        found.slots - found.idle_slots,
        found.blocks - found.idle_blocks,
    );
    assert_eq!(used, engine.held(), "slots, blocks: {what}");
}

/// Everything in use can be evicted from the cache.
pub fn nothing_held(engine: &mut Engine, what: &str) {
    engine.clear_cache();
    let left = engine.occupancy();
    let held = (left.slots, left.blocks, left.host_bytes);
    assert_eq!(held, (0, 0, 0), "slots, blocks, host bytes held: {what}");
}

/// The schedule with a device that does not fail; returns its number of calls.
fn sound(known: &Known, plan: &Shared, damaged: Option<usize>) -> usize {
    let mut engine = scarce(plan);
    let start = Plan {
        damaged,
        ..Plan::default()
    };
    *plan.lock().unwrap() = start;
    let ran = run(&mut engine);
    let calls = plan.lock().unwrap().calls;
    all_ended(&ran, known, Fault::Refused, "no fault");
    assert_eq!(ran.errors.len(), usize::from(damaged.is_some()));
    if damaged.is_none() {
        // The events that the schedule is made for do occur.
        let reused = |outcome: &Outcome| outcome.usage.cached_tokens > 0;
        assert!(ran.outcomes.values().any(reused), "no prefix was reused");
        assert!(engine.preemptions() > 0, "nobody was preempted");
        assert!(engine.occupancy().evictions > 0, "nothing was evicted");
        assert!(ran.snapshot.is_ok(), "no snapshot was taken");
    }
    nothing_held(&mut engine, "no fault");
    calls
}

/// The schedule once for each of its calls, which fails.
fn each_call_fails(damaged: Option<usize>) {
    let (known, plan) = (known(), Shared::default());
    let calls = sound(&known, &plan, damaged);
    println!("{calls} calls");
    for (fault, at) in Fault::ALL
        .into_iter()
        .flat_map(|fault| (0..calls).map(move |at| (fault, at)))
    {
        let what = format!("{fault:?} at call {at} of {calls}");
        *plan.lock().unwrap() = Plan::default();
        let mut engine = scarce(&plan);
        *plan.lock().unwrap() = Plan {
            fault: Some((at, fault)),
            damaged,
            ..Plan::default()
        };
        let ran = run(&mut engine);
        let is_planted = |error: &Error| planted(error, fault);
        let in_snapshot = ran.snapshot.as_ref().is_err_and(is_planted);
        let in_request = ran.errors.values().any(|error| is_planted(error));
        assert!(in_request || in_snapshot, "{what}: nobody was told");
        all_ended(&ran, &known, fault, &what);
        if fault != Fault::Lost {
            // At most those of one batch, and never those that wait.
            let failed = ran
                .errors
                .values()
                .filter(|error| is_planted(error))
                .count();
            assert!(failed <= SEQUENCES, "{what}: {failed} requests failed");
        }

        // If a fault ended the schedule early, the submission that was to be damaged has not run.
        plan.lock().unwrap().damaged = None;
        let mut last = Ran::default();
        engine.submit(RequestId(99), next()).unwrap();
        assert!(steps(&mut engine, &mut last, MOST_STEPS), "{what}");
        if fault == Fault::Lost {
            let error = last.errors.get(&RequestId(99)).expect(&what);
            assert!(planted(error, fault), "{what}: {error}");
        } else {
            let outcome = last.outcomes.get(&(RequestId(99), 0)).expect(&what);
            assert_eq!(outcome.said(), known.next.said(), "{what}");
        }
        nothing_held(&mut engine, &what);
    }
}

#[test]
fn each_call_of_a_schedule_fails_in_turn() {
    each_call_fails(None);
}

/// Numbers that are not finite let the engine run the tokens again and read every layer: those calls fail as well.
#[test]
fn each_call_of_a_schedule_with_damaged_numbers_fails_in_turn() {
    each_call_fails(Some(7));
}

/// Schedules per seed.
const SCHEDULES: usize = 250;

#[test]
fn random_schedules_of_the_fixed_seed_leak_nothing() {
    random_schedules(crate::seeds::FIXED, alone);
}

#[test]
fn random_schedules_of_the_drawn_seed_leak_nothing() {
    random_schedules(crate::seeds::drawn(), alone);
}

/// The third of four ranks fails: the first of the second stage, with half of the experts.
#[test]
fn random_schedules_with_a_rank_that_fails_leak_nothing() {
    random_schedules(crate::seeds::drawn(), third_of_four);
}

/// A device that fails as planned.
fn alone(plan: &Shared) -> Box<dyn Backend> {
    Box::new(Faulty::new(Box::new(CpuBackend::new()), plan))
}

fn third_of_four(plan: &Shared) -> Box<dyn Backend> {
    let opened = Cell::new(0);
    group("tiny-a", [1, 2, 2], || {
        opened.set(opened.get() + 1);
        match opened.get() {
            3 => alone(plan),
            _ => Box::new(CpuBackend::new()),
        }
    })
}

/// The device of a model, some of whose experts are on the host, fails.
#[test]
fn random_schedules_with_experts_on_the_host_leak_nothing() {
    random_schedules(crate::seeds::drawn(), |plan| {
        offloaded("tiny-a", 1, alone(plan), Box::new(CpuBackend::new()))
    });
}

/// The host fails.
#[test]
fn random_schedules_with_a_host_that_fails_leak_nothing() {
    random_schedules(crate::seeds::drawn(), |plan| {
        offloaded("tiny-a", 1, Box::new(CpuBackend::new()), alone(plan))
    });
}

fn random_schedules(seed: u64, open: fn(&Shared) -> Box<dyn Backend>) {
    crate::seeds::printed(seed);
    let mut rng = SmallRng::seed_from_u64(seed);
    let (mut failed, mut finished, mut evictions, mut preemptions) = (0, 0, 0, 0);
    for schedule in 0..SCHEDULES {
        let what = format!("seed {seed}, schedule {schedule}");
        let plan = Shared::default();
        let backend = open(&plan);
        let options = EngineOptions {
            host_bytes: [0, 60_000, 64 << 20][rng.random_range(0..3)],
            ..SCARCE
        };
        let pools = limits(3, rng.random_range(3..7), rng.random_range(10..20));
        let mut engine = engine_on(backend, "tiny-a", pools, options);
        let mut ran = Ran::default();
        let mut submitted: Vec<Request> = Vec::new();
        // Some of them export their caches; readers take some records, or are dropped.
        let mut streams = Vec::new();
        while submitted.len() < 8 || !engine.is_idle() {
            if submitted.len() < 8 && rng.random_range(0..2) == 0 {
                let kind = rng.random_range(0..requests().len());
                let request = requests().swap_remove(kind);
                let id = RequestId(submitted.len() as u64);
                if rng.random_range(0..3) == 0 {
                    let room = rng.random_range(1..6);
                    streams.push(engine.export(id, request.clone(), room).unwrap());
                } else {
                    engine.submit(id, request.clone()).unwrap();
                }
                submitted.push(request);
            }
            if rng.random_range(0..3) == 0 {
                let mut plan = plan.lock().unwrap();
                let at = plan.calls + rng.random_range(0..30);
                // A lost device serves no further request: the next schedule has another.
                let kinds = if submitted.len() == 8 { 4 } else { 3 };
                plan.fault = Some((at, Fault::ALL[rng.random_range(0..kinds)]));
            }
            if rng.random_range(0..8) == 0 && !submitted.is_empty() {
                engine.cancel(RequestId(rng.random_range(0..submitted.len() as u64)));
            }
            if rng.random_range(0..6) == 0 {
                streams.pop();
            }
            for stream in &mut streams {
                let _ = stream.try_next();
            }
            engine.send_exports();
            steps(&mut engine, &mut ran, 1);
            as_full_as_held(&engine, &what);
        }
        drop(streams);
        engine.send_exports();
        as_full_as_held(&engine, &what);
        for (id, request) in (0..).map(RequestId).zip(&submitted) {
            let ended = |sample| ran.outcomes.get(&(id, sample))?.reason;
            let all = (0..request.samples).all(|sample| ended(sample).is_some());
            assert!(all || ran.errors.contains_key(&id), "{what}: {id:?}");
        }
        failed += ran.errors.len();
        finished += submitted.len() - ran.errors.len();
        evictions += engine.occupancy().evictions;
        preemptions += engine.preemptions();
        nothing_held(&mut engine, &what);
    }
    println!("{failed} failed, {finished} finished, {evictions} evictions");
    assert!(failed > 200 && finished > 200, "{failed} and {finished}");
    assert!(
        evictions > 200 && preemptions > 50,
        "{evictions}, {preemptions}"
    );
}
