//! Pools that change their size while sequences run: answers do not change, nothing leaks, and the backend's count of its memory is
//! that of the sizes that were asked for.

use std::collections::BTreeMap;

use crate::ahead::Asynchronous;
use crate::engine_harness::{
    BLOCK, OPTIONS, Outcomes, answer, answers, collect, engine, engine_on, finish, limits, request,
    tokens,
};
use crate::failing::{as_full_as_held, nothing_held};
use crate::faulty::{Fault, Faulty, Plan, Shared};
use crate::group::{group, offloaded};
use crate::random::random;
use crate::speculation::{few, speculating};
use crate::wrapped::Wrapped;
use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::backend::{Backend, Caches, LayerHome, StateLayout};
use kimi_linear::engine::{Engine, EngineOptions, FinishReason, Request, RequestId};
use kimi_linear::error::{BackendError, Error};
use pollster::block_on;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

/// Schedules per seed.
const SCHEDULES: usize = 25;
/// Blocks of the longest sequence.
const LONGEST: usize = 9;

fn cpu() -> Box<dyn Backend> {
    Box::new(CpuBackend::new())
}

#[test]
fn answers_are_the_same_whatever_the_size_of_pools() {
    for seed in [crate::seeds::FIXED, crate::seeds::drawn()] {
        let resized = answers_stay(seed, cpu, cpu, OPTIONS, true);
        assert!(resized > 100, "{resized}");
    }
}

/// With steps that are submitted before the tokens of the step before are known: one is there whenever the size changes.
#[test]
fn answers_are_the_same_ahead_of_their_tokens() {
    let fed = Asynchronous::default();
    let open = || -> Box<dyn Backend> { Box::new(Wrapped::new(cpu(), fed.clone())) };
    answers_stay(crate::seeds::drawn(), cpu, open, OPTIONS, true);
    assert!(fed.count() > 20, "{}", fed.count());
}

/// With tokens that were verified and are not handed out when the size changes.
#[test]
fn answers_are_the_same_with_proposals() {
    let fed = Asynchronous::default();
    let open = || -> Box<dyn Backend> { Box::new(Wrapped::new(cpu(), fed.clone())) };
    let options = speculating(OPTIONS);
    for seed in [crate::seeds::FIXED, crate::seeds::drawn()] {
        answers_stay(seed, cpu, cpu, options, true);
        answers_stay(seed, cpu, open, options, true);
    }
}

#[test]
fn answers_are_the_same_on_several_devices_and_with_experts_on_the_host() {
    let seed = crate::seeds::drawn();
    let ranks = || group("tiny-a", [1, 2, 2], cpu);
    answers_stay(seed, cpu, ranks, OPTIONS, false);
    let halves = || group("tiny-a", [2, 1, 1], cpu);
    answers_stay(seed, halves, halves, OPTIONS, false);
    let both = || offloaded("tiny-a", 1, cpu(), cpu());
    answers_stay(seed, cpu, both, OPTIONS, false);
}

/// Runs schedules of requests, sizes and losses of all caches; compares answers with those of `beside` alone. Returns how often a pool
/// that was full enough to matter got another size.
fn answers_stay(
    seed: u64,
    beside: impl Fn() -> Box<dyn Backend>,
    open: impl Fn() -> Box<dyn Backend>,
    base: EngineOptions,
    counted: bool,
) -> usize {
    crate::seeds::printed(seed);
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut alone = engine_on(beside(), "tiny-a", limits(4, 8, 64), OPTIONS);
    let mut expected = BTreeMap::new();
    let (mut resized, mut checked, mut preemptions, mut recomputed) = (0, 0, 0, 0);
    for schedule in 0..SCHEDULES {
        let what = format!("seed {seed}, schedule {schedule}");
        let options = EngineOptions {
            host_bytes: [0, 200_000, 64 << 20][rng.random_range(0..3)],
            ..base
        };
        let pools = limits(
            rng.random_range(1..6),
            rng.random_range(1..7),
            rng.random_range(LONGEST..24),
        );
        let mut engine = engine_on(open(), "tiny-a", pools, options);
        let weights = engine.memory().weights;
        let context = engine.context();
        let mut submitted: BTreeMap<RequestId, (u64, Request)> = BTreeMap::new();
        let mut outcomes = Outcomes::new();
        let mut more = true;
        while submitted.len() < 12 || more {
            if submitted.len() < 12 && rng.random_range(0..3) == 0 {
                let id = RequestId(submitted.len() as u64);
                let (kind, mut request) = random(&mut rng);
                if base.prompt_lookup.is_some() {
                    request.sampling.logit_bias = few(kind);
                }
                // Requests without the cache are cut equally in every run: their answers must be equal to the bit.
                request.reuse = rng.random_range(0..3) == 0;
                engine.submit(id, request.clone()).unwrap();
                submitted.insert(id, (kind, request));
            }
            more = block_on(engine.step());
            collect(&mut engine, &mut outcomes);
            if rng.random_range(0..3) == 0 {
                let held = engine.held();
                let slots = rng.random_range(1..9);
                let blocks = rng.random_range(LONGEST..30);
                block_on(engine.resize(slots, blocks)).unwrap();
                let found = engine.occupancy();
                assert_eq!((found.all_slots, found.all_blocks), (slots, blocks));
                assert_eq!(engine.context(), context, "{what}");
                if counted {
                    memory_is(&engine, weights, &what);
                }
                resized += usize::from(held.0 > slots || held.1 > blocks);
                more = !engine.is_idle();
            }
            if rng.random_range(0..25) == 0 {
                let (running, _) = engine.load();
                engine.recompute_all();
                recomputed += running;
                let left = engine.occupancy();
                assert_eq!((left.slots, left.blocks), (0, 0), "{what}");
                more = !engine.is_idle();
            }
            as_full_as_held(&engine, &what);
        }
        finish(&mut engine, &mut outcomes);
        for (id, (kind, request)) in &submitted {
            let cold = || Request {
                reuse: false,
                ..request.clone()
            };
            let expected = expected
                .entry(*kind)
                .or_insert_with(|| answers(&mut alone, cold()));
            for sample in 0..request.samples {
                let what = format!("{what}: {id:?}, kind {kind}, sample {sample}");
                let outcome = outcomes.get(&(*id, sample)).expect(&what);
                assert_eq!(outcome.error, None, "{what}");
                assert!(
                    outcome
                        .reason
                        .is_some_and(|it| it != FinishReason::Cancelled)
                );
                if !request.reuse {
                    assert_eq!(outcome.said(), expected[sample].said(), "{what}");
                    checked += 1;
                }
            }
        }
        preemptions += engine.preemptions();
        nothing_held(&mut engine, &what);
    }
    println!(
        "{resized} pools became too small, {preemptions} preemptions, {recomputed} sequences recomputed, {checked} answers compared"
    );
    assert!(checked > 100 && preemptions > 20 && recomputed > 10);
    resized
}

/// The backend counts what pools of these sizes take, and nothing else has come or gone.
fn memory_is(engine: &Engine, weights: u64, what: &str) {
    let (memory, layout) = (engine.memory(), engine.cache_layout());
    assert_eq!(memory.states, layout.states.bytes(), "{what}");
    assert_eq!(memory.latents, layout.latents.bytes(), "{what}");
    assert_eq!(memory.weights, weights, "{what}");
    let demand = engine.demand();
    let all = demand.bytes(demand.all_slots, demand.all_blocks);
    assert_eq!(memory.states + memory.latents, all, "{what}");
}

/// What is in the last places moves, what is cached is evicted, and only then sequences are preempted.
#[test]
fn sequences_are_preempted_only_where_nothing_else_helps() {
    let mut engine = engine("tiny-a", limits(3, 12, 48), OPTIONS);
    let mut outcomes = Outcomes::new();
    for id in 0..4 {
        let _ = answer(&mut engine, request(tokens(id, 3 * BLOCK + 5), 4));
    }
    for id in 0..3 {
        let request = Request {
            reuse: false,
            ..request(tokens(10 + id, 2 * BLOCK), 2 * BLOCK)
        };
        engine.submit(RequestId(id), request).unwrap();
    }
    for _ in 0..5 {
        block_on(engine.step());
    }
    let (slots, blocks) = engine.held();
    assert_eq!((slots, engine.load().0), (3, 3));
    let cached = engine.occupancy().device_checkpoints;
    assert!(cached > 3, "{cached}");
    block_on(engine.resize(6, 40)).unwrap();
    assert_eq!(engine.preemptions(), 0);
    assert!(engine.occupancy().device_checkpoints >= 3);
    block_on(engine.resize(slots, blocks)).unwrap();
    assert_eq!(engine.preemptions(), 0);
    assert_eq!(engine.load().0, 3);
    block_on(engine.resize(slots - 1, blocks)).unwrap();
    assert_eq!((engine.preemptions(), engine.load()), (1, (2, 1)));
    let demand = engine.demand();
    assert_eq!((demand.held_slots, demand.queued_slots), (2, 1));
    assert_eq!(demand.queued_blocks, 3);
    finish(&mut engine, &mut outcomes);
    assert_eq!(outcomes.len(), 3);
    assert!(
        outcomes
            .values()
            .all(|outcome| outcome.tokens.len() == 2 * BLOCK)
    );
}

/// A pool that cannot get its size, by each call of a resize in turn, is one of a known size; the engine goes on, and the next
/// attempt succeeds.
#[test]
fn a_size_that_is_refused_leaves_an_engine_that_goes_on() {
    let next = || Request {
        reuse: false,
        ..request(tokens(9, 3 * BLOCK), 4)
    };
    let expected = answer(&mut engine("tiny-a", limits(1, 4, 64), OPTIONS), next());
    let sizes = [(2, 10), (7, 40), (2, 40), (7, 10)];
    let mut refused = 0;
    for (to, fault) in sizes
        .into_iter()
        .flat_map(|to| [Fault::Refused, Fault::Memory].map(|fault| (to, fault)))
    {
        for at in 0.. {
            let what = format!("{fault:?} at call {at} of a resize to {to:?}");
            let plan = Shared::default();
            let backend = Box::new(Faulty::new(cpu(), &plan));
            let mut engine = engine_on(backend, "tiny-a", limits(3, 5, 24), OPTIONS);
            let mut outcomes = Outcomes::new();
            for id in 0..3 {
                let request = request(tokens(id, 2 * BLOCK + 3), 12);
                engine.submit(RequestId(id), request).unwrap();
            }
            for _ in 0..4 {
                block_on(engine.step());
            }
            let calls = plan.lock().unwrap().calls;
            plan.lock().unwrap().fault = Some((calls + at, fault));
            let resized = block_on(engine.resize(to.0, to.1));
            let done = plan.lock().unwrap().calls - calls;
            *plan.lock().unwrap() = Plan::default();
            as_full_as_held(&engine, &what);
            let found = engine.occupancy();
            let memory = engine.memory();
            assert_eq!(memory.states, states(&engine, found.all_slots), "{what}");
            refused += usize::from(resized.is_err());
            block_on(engine.resize(to.0, to.1)).unwrap();
            let found = engine.occupancy();
            assert_eq!((found.all_slots, found.all_blocks), to, "{what}");
            finish(&mut engine, &mut outcomes);
            assert_eq!(
                answer(&mut engine, next()).said(),
                expected.said(),
                "{what}"
            );
            nothing_held(&mut engine, &what);
            if done <= at {
                break;
            }
        }
    }
    println!("{refused} resizes were refused");
    assert!(refused > 20, "{refused}");
}

/// Bytes of this number of slots.
fn states(engine: &Engine, slots: usize) -> u64 {
    let layout = engine.cache_layout().states;
    StateLayout { slots, ..layout }.bytes()
}

#[test]
fn a_device_whose_layers_have_a_fixed_place_says_so() {
    let mut engine = engine("tiny-a", limits(1, 4, 64), OPTIONS);
    let expected = answer(&mut engine, request(tokens(1, 20), 4));
    for caches in [Caches::Keep, Caches::Discard] {
        let placed = block_on(engine.place(1, &LayerHome::whole(0), caches));
        let error = placed.unwrap_err();
        let unsupported = matches!(*error, Error::Backend(BackendError::Unsupported { .. }));
        assert!(unsupported, "{error}");
        assert!(error.to_string().contains("layers that change their place"));
    }
    let placed = block_on(engine.place(99, &LayerHome::whole(0), Caches::Keep));
    assert!(placed.unwrap_err().to_string().contains("below"));
    let found = answer(&mut engine, request(tokens(1, 20), 4));
    assert_eq!(found.tokens, expected.tokens);
}
