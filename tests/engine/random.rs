//! Random schedules on pools that are far too small: nothing leaks, and answers do not change.
//!
//! With a fixed and with a random seed, which is in the message of a run that fails; `KIMI_LINEAR_TEST_SEED` sets it.

use std::collections::BTreeMap;

use crate::ahead::Asynchronous;
use crate::engine_harness::{
    OPTIONS, Outcomes, answer, answers, collect, drawn, engine_on, finish, limits, request, tokens,
};
use crate::group::group;
use crate::speculation::{few, speculating};
use crate::wrapped::Wrapped;
use kimi_linear::backend::Backend;
use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::engine::{EngineOptions, FinishReason, Request, RequestId, Sampling};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

/// Minimum number of cancellations, evictions and preemptions in one run.
const EVENTS: u64 = 500;

/// A request from a small family, so that prefixes are shared and answers can be computed before.
pub fn random(rng: &mut SmallRng) -> (u64, Request) {
    let kind = rng.random_range(0..24_u64);
    let common = tokens(kind % 3 + 1, 16 * (kind % 4 + 1) as usize);
    let own = tokens(100 + kind, 1 + (kind * 7 % 40) as usize);
    let prompt = [common, own].concat();
    let sampling = if kind % 2 == 0 {
        Sampling::GREEDY
    } else {
        drawn(kind)
    };
    let samples = if kind % 5 == 0 { 3 } else { 1 };
    let turn_ends = if kind % 7 == 0 {
        vec![prompt.len() / 2]
    } else {
        Vec::new()
    };
    let request = request(prompt, 3 + (kind * 5 % 30) as usize);
    (
        kind,
        Request {
            sampling,
            samples,
            turn_ends,
            ..request
        },
    )
}

#[test]
fn schedules_of_the_fixed_seed_leave_nothing_behind() {
    nothing_left_behind(crate::seeds::FIXED, cpu);
}

#[test]
fn schedules_of_the_drawn_seed_leave_nothing_behind() {
    nothing_left_behind(crate::seeds::drawn(), cpu);
}

/// With steps that are submitted before the tokens of the step before are known.
#[test]
fn schedules_ahead_of_their_tokens_leave_nothing_behind() {
    let fed = Asynchronous::default();
    nothing_left_behind(crate::seeds::drawn(), || {
        Box::new(Wrapped::new(cpu(), fed.clone()))
    });
    assert!(fed.count() > 20, "{}", fed.count());
}

fn cpu() -> Box<dyn Backend> {
    Box::new(CpuBackend::new())
}

/// Two ranks with half of the experts, and two stages: the answers of one device.
#[test]
fn schedules_of_ranks_with_whole_experts_leave_nothing_behind() {
    let ranks = || group("tiny-a", [1, 2, 2], cpu);
    nothing_left_behind(crate::seeds::drawn(), ranks);
}

/// Two ranks with half of the heads: the answers of such ranks alone.
#[test]
fn schedules_of_ranks_with_half_of_the_heads_leave_nothing_behind() {
    let ranks = || group("tiny-a", [2, 1, 1], cpu);
    nothing_left_behind_beside(crate::seeds::drawn(), ranks, ranks, OPTIONS);
}

/// With proposals that are verified: the answers of an engine that takes a token per step.
#[test]
fn schedules_with_proposals_leave_nothing_behind() {
    for seed in [crate::seeds::FIXED, crate::seeds::drawn()] {
        nothing_left_behind_beside(seed, cpu, cpu, speculating(OPTIONS));
    }
}

/// The same where the engine may submit steps ahead of their tokens.
#[test]
fn schedules_with_proposals_on_an_asynchronous_device_leave_nothing_behind() {
    let fed = Asynchronous::default();
    let open = || -> Box<dyn Backend> { Box::new(Wrapped::new(cpu(), fed.clone())) };
    nothing_left_behind_beside(crate::seeds::drawn(), cpu, open, speculating(OPTIONS));
}

fn nothing_left_behind(seed: u64, backend: impl Fn() -> Box<dyn Backend>) {
    nothing_left_behind_beside(seed, cpu, backend, OPTIONS);
}

/// Answers are compared with those of `beside` alone.
fn nothing_left_behind_beside(
    seed: u64,
    beside: impl Fn() -> Box<dyn Backend>,
    backend: impl Fn() -> Box<dyn Backend>,
    base: EngineOptions,
) {
    crate::seeds::printed(seed);
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut alone = engine_on(beside(), "tiny-a", limits(4, 8, 64), OPTIONS);
    let mut expected = BTreeMap::new();
    let (mut cancellations, mut checked) = (0, 0);
    let (mut evictions, mut preemptions) = (0, 0);
    let (mut drafts, mut accepted) = (0, 0);
    while cancellations < EVENTS / 4
        || evictions < EVENTS / 4
        || preemptions < EVENTS / 4
        || cancellations + evictions + preemptions < EVENTS
    {
        let options = EngineOptions {
            host_bytes: [0, 200_000, 64 << 20][rng.random_range(0..3)],
            quantum: [4, 1 << 20][rng.random_range(0..2)],
            cached_steps: rng.random_range(1..8),
            ..base
        };
        let (sequences, slots) = (rng.random_range(1..6), rng.random_range(1..7));
        let mut engine = engine_on(
            backend(),
            "tiny-a",
            limits(sequences, slots, rng.random_range(9..24)),
            options,
        );
        let mut submitted: BTreeMap<RequestId, (u64, Request)> = BTreeMap::new();
        let mut outcomes = Outcomes::new();
        for id in 0..40 {
            let (kind, mut request) = random(&mut rng);
            if base.prompt_lookup.is_some() {
                request.sampling.logit_bias = few(kind);
            }
            // Requests without the cache are cut equally in every run: their answers must be equal to the bit.
            request.reuse = rng.random_range(0..3) > 0;
            if !request.reuse {
                let cold = || Request {
                    reuse: false,
                    ..request.clone()
                };
                expected
                    .entry(kind)
                    .or_insert_with(|| answers(&mut alone, cold()));
            }
            engine.submit(RequestId(id), request.clone()).unwrap();
            submitted.insert(RequestId(id), (kind, request));
            for _ in 0..rng.random_range(0..4) {
                pollster::block_on(engine.step());
                collect(&mut engine, &mut outcomes);
            }
            if rng.random_range(0..4) == 0 {
                engine.cancel(RequestId(rng.random_range(0..=id)));
                cancellations += 1;
            }
            if rng.random_range(0..16) == 0 {
                engine.clear_cache();
            }
        }
        finish(&mut engine, &mut outcomes);
        for (id, (kind, request)) in &submitted {
            for sample in 0..request.samples {
                let outcome = outcomes
                    .get(&(*id, sample))
                    .unwrap_or_else(|| panic!("seed {seed}: {id:?} has no end"));
                assert_eq!(outcome.error, None, "seed {seed}: {id:?}");
                let reason = outcome
                    .reason
                    .unwrap_or_else(|| panic!("seed {seed}: {id:?} does not end"));
                if !request.reuse && reason != FinishReason::Cancelled {
                    let expected = &expected[kind][sample];
                    assert_eq!(
                        outcome.said(),
                        expected.said(),
                        "seed {seed}: {id:?}, sample {sample}"
                    );
                    checked += 1;
                }
            }
        }
        evictions += engine.occupancy().evictions;
        preemptions += engine.preemptions();
        drafts += engine.speculated().drafts;
        accepted += engine.speculated().accepted_tokens;
        // The next request's answer is right, and everything in use can be evicted from the cache.
        let (kind, next) = random(&mut rng);
        let cold = || Request {
            reuse: false,
            samples: 1,
            ..next.clone()
        };
        assert_eq!(
            answer(&mut engine, cold()).said(),
            answer(&mut alone, cold()).said(),
            "seed {seed}: kind {kind}"
        );
        engine.clear_cache();
        let left = engine.occupancy();
        assert_eq!(
            (left.slots, left.blocks, left.host_bytes),
            (0, 0, 0),
            "seed {seed}"
        );
    }
    println!(
        "{cancellations} cancellations, {evictions} evictions, {preemptions} preemptions; {checked} answers compared; {drafts} proposals, {accepted} \
         tokens of them accepted"
    );
    assert!(
        checked > 100,
        "seed {seed}: only {checked} answers could be compared"
    );
    assert!(
        base.prompt_lookup.is_none() || (drafts > 200 && accepted > 100),
        "seed {seed}: only {drafts} proposals, of which {accepted} tokens were accepted"
    );
}
