//! Parameters that are dropped and restored while requests are answered: answers do not change, and no device holds more than it may.

use std::time::{Duration, Instant};

use crate::engine_harness::{answer, drawn, request, tokens};
use crate::faulty::Fault;
use crate::harness::{Dropping, Reading, SLOTS, dropping, submit, submit_one};
use kimi_linear::data_parallel::{ParameterDrop, ParameterState};
use kimi_linear::engine::{EngineClient, Event, Request};

const FORMS: [ParameterDrop; 2] = [ParameterDrop::Experts, ParameterDrop::Layers];

/// An engine with the same blocks and cuts, but with all memory that it needs.
pub fn alone() -> kimi_linear::engine::Engine {
    use kimi_linear::engine::{Engine, EngineOptions, EngineSizes};
    let sizes = EngineSizes {
        prefill_chunk: 64,
        ..EngineSizes::one(512)
    };
    let limits = sizes.limits(kimi_linear::config::Dtype::F32);
    let model = crate::engine_harness::load("tiny-a", limits);
    Engine::new(model, EngineOptions::default())
}

/// Requests whose bits can be compared.
fn cold(seed: u64, max_tokens: usize) -> Request {
    Request {
        reuse: false,
        sampling: drawn(seed),
        ..request(tokens(seed, 20 + (seed * 31 % 150) as usize), max_tokens)
    }
}

fn first_token(reading: &Reading) {
    while !matches!(reading.next(), Some(Event::Token { .. })) {}
}

/// Waits until this holds; no device ever holds more than it may.
pub fn wait(replicas: &Dropping, what: &str, holds: impl Fn(&Dropping) -> bool) {
    let start = Instant::now();
    while !holds(replicas) {
        assert!(
            start.elapsed().as_secs() < 60,
            "{what}: {:?}",
            replicas.parameters()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn are(state: ParameterState) -> impl Fn(&Dropping) -> bool {
    move |replicas| replicas.states().iter().all(|it| *it == state)
}

#[test]
fn dropped_parameters_are_room_for_caches_and_come_back() {
    for form in FORMS {
        let replicas = dropping(form, 2, false);
        let (whole, dropped) = (replicas.states.whole, replicas.states.dropped[&2]);
        assert_eq!(whole.slots, SLOTS);
        assert!(dropped.slots >= whole.slots && dropped.blocks >= whole.blocks);
        assert_ne!(dropped, whole, "{form:?}");
        assert!(are(ParameterState::Whole)(&replicas));
        // The caches that were cached meanwhile are there afterwards.
        let mut alone = alone();
        let expected: Vec<_> = (0..8)
            .map(|seed| answer(&mut alone, cold(seed, 60)))
            .collect();
        let before = replicas.held();
        for _ in 0..3 {
            let reading = submit(&replicas.client, (0..8).map(|it| cold(it, 60)).collect());
            first_token(&reading[5]);
            replicas.client.drop_parameters().unwrap();
            let parameters = replicas.parameters();
            for (replica, before) in parameters.replicas.iter().zip(&before) {
                assert_eq!(replica.state, ParameterState::Dropped);
                assert_eq!(replica.group, [0, 1]);
                assert_eq!(
                    (replica.slots, replica.blocks),
                    (dropped.slots, dropped.blocks)
                );
                assert!(replica.memory.weights < before.0, "{form:?}");
            }
            let caches = |(_, states, latents): &(u64, u64, u64)| states + latents;
            let now: u64 = replicas.held().iter().map(caches).sum();
            assert!(now > before.iter().map(caches).sum(), "{form:?}");
            let status = replicas.client.status().unwrap();
            assert_eq!(status.occupancy.all_slots, 2 * dropped.slots);
            replicas.client.restore_parameters().unwrap();
            assert_eq!(replicas.held(), before, "{form:?}");
            assert!(are(ParameterState::Whole)(&replicas));
            for (index, (reading, expected)) in reading.into_iter().zip(&expected).enumerate() {
                if index == 5 {
                    continue;
                }
                let found = reading.outcome();
                assert_eq!(found.error, None);
                assert_eq!(found.said(), expected.said(), "{form:?} {index}");
            }
        }
        let parameters = replicas.parameters();
        assert_eq!((parameters.drops, parameters.restores), (3, 3));
        assert_eq!((parameters.failures, parameters.migrated), (0, 0));
    }
}

#[test]
fn orders_that_cannot_be_followed_are_refused() {
    let replicas = dropping(ParameterDrop::Experts, 2, false);
    replicas.client.drop_parameters().unwrap();
    replicas.client.drop_parameters().unwrap();
    assert_eq!(replicas.parameters().drops, 1);
    replicas.client.restore_parameters().unwrap();
    replicas.client.restore_parameters().unwrap();
    assert_eq!(replicas.parameters().restores, 1);
    // Three replicas cannot divide eight experts.
    let replicas = dropping(ParameterDrop::Experts, 3, false);
    let error = replicas.client.drop_parameters().unwrap_err().to_string();
    assert!(error.contains("a group of 3 replicas"), "{error}");
    let plain = crate::harness::failing(&[Default::default()]);
    let error = plain.drop_parameters().unwrap_err().to_string();
    assert!(error.contains("loaded to keep them"), "{error}");
    assert!(plain.parameters().is_none());
}

/// Three replicas as one pipeline, and four that share experts.
#[test]
fn larger_groups_drop_more() {
    for (form, count) in [(ParameterDrop::Layers, 3), (ParameterDrop::Experts, 4)] {
        let replicas = dropping(form, count, false);
        let before = replicas.held();
        let reading = submit(&replicas.client, (0..12).map(|it| cold(it, 40)).collect());
        replicas.client.drop_parameters().unwrap();
        let weights: u64 = replicas.held().iter().map(|it| it.0).sum();
        assert!(weights < before.iter().map(|it| it.0).sum::<u64>() / 2 + before[0].0);
        replicas.client.restore_parameters().unwrap();
        assert_eq!(replicas.held(), before);
        let mut alone = alone();
        for (seed, reading) in reading.into_iter().enumerate() {
            let expected = answer(&mut alone, cold(seed as u64, 40));
            assert_eq!(reading.outcome().said(), expected.said(), "{form:?}");
        }
    }
}

/// More sequences than slots: parameters are dropped, and restored when they have ended.
#[test]
fn a_burst_drops_and_its_end_restores() {
    for form in FORMS {
        let replicas = dropping(form, 2, true);
        let before = replicas.held();
        // Each of them needs blocks for a long prompt, and many are there at once.
        let long = |seed: u64| Request {
            reuse: false,
            ..request(tokens(seed, 300), 100)
        };
        let reading = submit(&replicas.client, (0..14).map(long).collect());
        wait(&replicas, "no drop", |it| it.parameters().drops > 0);
        let mut alone = alone();
        for (seed, reading) in reading.into_iter().enumerate() {
            let expected = answer(&mut alone, long(seed as u64));
            let found = reading.outcome();
            assert_eq!(found.error, None);
            assert_eq!(found.tokens, expected.tokens, "{form:?} {seed}");
            replicas.parameters();
        }
        wait(&replicas, "no restore", are(ParameterState::Whole));
        assert_eq!(replicas.held(), before);
        let seconds = replicas.parameters().replicas[0].seconds;
        assert!(seconds[0] > 0.0 && seconds[2] > 0.0, "{seconds:?}");
        // Calm requests change nothing.
        let drops = replicas.parameters().drops;
        for seed in 0..4 {
            submit_one(&replicas.client, long(seed)).outcome();
        }
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(replicas.parameters().drops, drops);
    }
}

/// The device of one member is lost, at any moment of a drop, of answers in the group, or of a restore.
#[test]
fn the_rest_of_a_group_goes_on_alone() {
    for form in FORMS {
        for (stage, calls) in [
            (0, 3),
            (0, 40),
            (0, 90),
            (1, 0),
            (1, 5),
            (1, 30),
            (2, 10),
            (2, 60),
        ] {
            let replicas = dropping(form, 2, false);
            let before = replicas.held();
            let lost = calls % 2;
            let fail = || {
                let mut plan = replicas.plans[lost].lock().unwrap();
                plan.fault = Some((plan.calls + calls, Fault::Lost));
            };
            let reading = submit(&replicas.client, (0..6).map(|it| cold(it, 60)).collect());
            first_token(&submit_one(&replicas.client, cold(9, 100)));
            if stage == 0 {
                fail();
            }
            let _ = replicas.client.drop_parameters();
            if stage == 1 {
                fail();
                std::thread::sleep(Duration::from_millis(20));
            }
            if stage == 2 {
                fail();
                let _ = replicas.client.restore_parameters();
            }
            let mut alone = alone();
            for (seed, reading) in reading.into_iter().enumerate() {
                let expected = answer(&mut alone, cold(seed as u64, 60));
                let found = reading.outcome();
                assert_eq!(found.error, None, "{form:?} {stage} {calls}");
                assert_eq!(found.tokens, expected.tokens, "{form:?} {stage} {calls}");
            }
            // If it was not asked so often, it is lost now.
            replicas.plans[lost].lock().unwrap().lost = true;
            let _ = submit(&replicas.client, (0..4).map(|it| cold(it, 4)).collect())
                .into_iter()
                .map(Reading::outcome)
                .collect::<Vec<_>>();
            wait(&replicas, "not lost", |it| it.parameters().failures == 1);
            let other = 1 - lost;
            wait(&replicas, "not whole", |it| {
                it.states()[other] == ParameterState::Whole
            });
            assert_eq!(replicas.states()[lost], ParameterState::Lost);
            assert_eq!(
                replicas.held()[other],
                before[other],
                "{form:?} {stage} {calls}"
            );
            let expected = answer(&mut alone, cold(3, 60));
            let found = submit_one(&replicas.client, cold(3, 60)).outcome();
            assert_eq!(found.said(), expected.said());
        }
    }
}

/// Memory that runs out in the middle of a change: it is taken back, and tried again.
#[test]
fn a_change_that_fails_is_taken_back() {
    for form in FORMS {
        let mut failed = 0;
        for calls in 0..9 {
            let replicas = dropping(form, 2, false);
            let before = replicas.held();
            {
                let mut plan = replicas.plans[1].lock().unwrap();
                plan.fault = Some((plan.calls + calls, Fault::Memory));
            }
            if replicas.client.drop_parameters().is_ok() {
                // That call freed something: what it did not free is there for ever.
                continue;
            }
            failed += 1;
            wait(&replicas, "not taken back", are(ParameterState::Whole));
            assert_eq!(replicas.held(), before, "{form:?} {calls}");
            let expected = answer(&mut alone(), cold(3, 60));
            let found = submit_one(&replicas.client, cold(3, 60)).outcome();
            assert_eq!(found.said(), expected.said());
            replicas.client.drop_parameters().unwrap();
            assert!(are(ParameterState::Dropped)(&replicas));
        }
        assert!(failed > 2, "{form:?}: {failed} changes have failed");
    }
}
