//! Replicas without dropping: requests go to the least loaded, and go on elsewhere when a device fails.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crate::engine_harness::{OPTIONS, answer, answers, drawn, engine, limits, request, tokens};
use crate::faulty::{Fault, Shared};
use crate::harness::{MOST, failing, submit, submit_one};
use kimi_linear::data_parallel::DataParallel;
use kimi_linear::engine::{
    EngineClient, Event, FinishReason, Grammar, Guide, PromptScores, Request,
};

/// Requests of one answer whose bits can be compared: none continues from the cache of another.
fn cold(seed: u64) -> Request {
    Request {
        reuse: false,
        sampling: drawn(seed),
        ..request(tokens(seed, 20 + (seed % 37) as usize), 24)
    }
}

/// Requests for several answers.
fn several(seed: u64) -> Request {
    Request {
        samples: 3,
        ..cold(seed)
    }
}

fn alone() -> kimi_linear::engine::Engine {
    engine("tiny-a", limits(3, 6, 64), OPTIONS)
}

fn plans() -> [Shared; 2] {
    [Shared::default(), Shared::default()]
}

fn submissions(plan: &Shared) -> usize {
    plan.lock().unwrap().submissions
}

/// The device fails in this many calls.
fn fail_in(plan: &Shared, calls: usize, fault: Fault) {
    let mut plan = plan.lock().unwrap();
    plan.fault = Some((plan.calls + calls, fault));
}

/// Waits for a request's first token.
fn first_token(reading: &crate::harness::Reading) {
    while !matches!(reading.next(), Some(Event::Token { .. })) {}
}

fn nothing_is_left(client: &DataParallel) {
    let start = Instant::now();
    loop {
        client.clear_cache().unwrap();
        let status = client.status().unwrap();
        let held = (status.occupancy.slots, status.occupancy.blocks);
        if (status.running, status.waiting, held) == (0, 0, (0, 0)) {
            return;
        }
        assert!(start.elapsed().as_secs() < 30, "{status:?}");
    }
}

#[test]
fn replicas_share_the_requests_and_answer_as_one_engine() {
    let plans = plans();
    let client = failing(&plans);
    let reading = submit(&client, (0..12).map(cold).collect());
    let mut alone = alone();
    for (seed, reading) in reading.into_iter().enumerate() {
        let expected = answer(&mut alone, cold(seed as u64));
        let found = reading.outcome();
        assert_eq!(found.said(), expected.said());
        assert_eq!(found.usage, expected.usage);
    }
    // Six requests each, of 24 tokens, three at a time.
    for plan in &plans {
        assert!(submissions(plan) > 40, "{}", submissions(plan));
    }
    nothing_is_left(&client);
    assert_eq!(client.migrated(), 0);
}

#[test]
fn a_request_for_several_answers_goes_to_one_replica() {
    let plans = plans();
    let client = failing(&plans);
    let expected = answers(&mut alone(), several(5));
    let found = submit_one(&client, several(5)).outcomes();
    let said = |all: &[crate::engine_harness::Outcome]| -> Vec<_> {
        all.iter().map(|one| one.tokens.clone()).collect()
    };
    assert_eq!(said(&found), said(&expected));
    assert_eq!(
        (submissions(&plans[0]) > 0, submissions(&plans[1])),
        (true, 0)
    );
    // The next goes to the other.
    submit_one(&client, cold(6)).outcome();
    assert!(submissions(&plans[1]) > 0);
}

#[test]
fn requests_are_taken_together_or_not_at_all() {
    let client = failing(&plans());
    let error = |requests| {
        let reading = submit(&client, requests).remove(0);
        reading.outcomes().remove(0).error.unwrap()
    };
    let many = |count| (0..count as u64).map(cold).collect::<Vec<_>>();
    let text = error(many(2 * MOST + 1));
    assert!(text.contains("at most 128 run and wait"), "{text}");
    let kept: Vec<_> = (0..2 * MOST - 1)
        .map(|_| cold(0))
        .map(|it| Request {
            max_tokens: 400,
            ..it
        })
        .collect();
    let reading = submit(&client, kept);
    let text = error(many(2));
    assert!(text.contains("the queue is full"), "{text}");
    for one in &reading {
        client.cancel(one.id);
    }
    for one in reading {
        assert_eq!(one.outcome().reason, Some(FinishReason::Cancelled));
    }
    nothing_is_left(&client);
}

#[test]
fn a_prompt_and_its_answer_are_within_the_context() {
    let client = failing(&plans());
    let long = Request {
        max_tokens: 5000,
        ..cold(2)
    };
    let prompt = long.prompt.len();
    let outcome = submit_one(&client, long).outcome();
    assert_eq!(outcome.tokens.len(), 64 * 16 + 1 - prompt);
    assert_eq!(outcome.reason, Some(FinishReason::Length));
    let error = submit_one(&client, request(tokens(1, 64 * 16 + 1), 1))
        .outcome()
        .error;
    assert!(error.unwrap().contains("the context holds 1024"));
}

/// At every moment of an answer, and in every way: as long as one device works, answers are those of one engine.
#[test]
fn answers_go_on_elsewhere_when_a_device_is_lost() {
    let mut alone = alone();
    let expected: Vec<_> = (0..8).map(|seed| answer(&mut alone, cold(seed))).collect();
    let expected_of_several = answers(&mut alone, several(9));
    for calls in [0, 1, 2, 3, 5, 8, 13, 21, 34] {
        let plans = plans();
        let client = failing(&plans);
        fail_in(&plans[0], calls, Fault::Lost);
        let reading = submit(&client, (0..8).map(cold).chain([several(9)]).collect());
        let mut reading = reading.into_iter();
        for expected in &expected {
            let found = reading.next().unwrap().outcome();
            assert_eq!(found.error, None);
            assert_eq!(found.tokens, expected.tokens, "lost after {calls} calls");
            assert_eq!(
                (found.reason, found.usage),
                (expected.reason, expected.usage)
            );
            assert_eq!(found.logprobs.len(), expected.logprobs.len());
        }
        for (found, expected) in reading
            .next()
            .unwrap()
            .outcomes()
            .iter()
            .zip(&expected_of_several)
        {
            assert_eq!(found.tokens, expected.tokens, "lost after {calls} calls");
        }
        assert!(client.migrated() > 0 && client.is_running());
        // The lost one is not asked again at once.
        let before = submissions(&plans[0]);
        submit_one(&client, cold(1)).outcome();
        submit_one(&client, cold(2)).outcome();
        assert_eq!(submissions(&plans[0]), before);
    }
}

#[test]
fn a_replica_that_works_again_is_used_again() {
    let plans = plans();
    let client = failing(&plans);
    fail_in(&plans[0], 4, Fault::Lost);
    let reading = submit(&client, (0..4).map(cold).collect());
    for one in reading {
        assert_eq!(one.outcome().error, None);
    }
    plans[0].lock().unwrap().lost = false;
    let (before, start) = (submissions(&plans[0]), Instant::now());
    while submissions(&plans[0]) == before {
        assert!(start.elapsed().as_secs() < 30, "it is not tried again");
        assert_eq!(submit_one(&client, cold(1)).outcome().error, None);
    }
}

#[test]
fn without_a_device_requests_fail_with_its_error() {
    let plans = plans();
    let client = failing(&plans);
    for plan in &plans {
        fail_in(plan, 3, Fault::Lost);
    }
    for one in submit(&client, (0..6).map(cold).collect()) {
        let error = one.outcome().error.unwrap();
        assert!(error.contains("injected this loss"), "{error}");
    }
    // Failures of a step are those of its requests, as with one engine.
    let plans = [Shared::default()];
    let client = failing(&plans);
    fail_in(&plans[0], 3, Fault::Refused);
    let error = submit_one(&client, cold(1)).outcome().error.unwrap();
    assert!(error.contains("injected this failure"), "{error}");
    assert_eq!(submit_one(&client, cold(1)).outcome().error, None);
    assert_eq!(client.migrated(), 0);
}

#[test]
fn a_replica_that_ends_leaves_its_answers_to_the_others() {
    let client = failing(&plans());
    let long = |seed| Request {
        max_tokens: 200,
        ..cold(seed)
    };
    let mut alone = alone();
    let expected: Vec<_> = (0..5).map(|seed| answer(&mut alone, long(seed))).collect();
    let reading = submit(&client, (0..5).map(long).collect());
    let started = submit_one(&client, long(0));
    first_token(&started);
    client.end(1).unwrap();
    for (reading, expected) in reading.into_iter().zip(&expected) {
        let found = reading.outcome();
        assert_eq!(
            (&found.tokens, found.usage),
            (&expected.tokens, expected.usage)
        );
    }
    assert!(client.migrated() > 0 && client.is_running());
    drop(started);
    client.end(0).unwrap();
    assert!(!client.is_running() && client.status().is_err());
    let error = submit_one(&client, cold(0)).outcome().error.unwrap();
    assert!(error.contains("stopped"), "{error}");
}

#[test]
fn scores_of_a_prompt_are_told_once() {
    let scored = || Request {
        scores: PromptScores::Likelihoods,
        ..Request::new(tokens(3, 150), 2)
    };
    let read = |client: &DataParallel| {
        let reading = submit_one(client, scored());
        let mut positions = Vec::new();
        while let Some(event) = reading.next() {
            match event {
                Event::Scored(scored) => {
                    let first = scored.first;
                    let each = scored.logprobs.into_iter().enumerate();
                    positions.extend(each.map(|(i, it)| (first + i, it.map(f32::to_bits))));
                }
                Event::Failed(error) => panic!("{error}"),
                _ => {}
            }
        }
        positions
    };
    let expected = read(&failing(&plans()));
    assert_eq!(expected.len(), 150);
    let plans = plans();
    let client = failing(&plans);
    fail_in(&plans[0], 4, Fault::Lost);
    assert_eq!(read(&client), expected);
    assert_eq!(client.migrated(), 1);
}

/// A grammar that ends the thread of the first engine that asks for it.
#[derive(Debug, Default)]
struct Panicking(AtomicBool);

impl Grammar for Panicking {
    fn guide(&self) -> Box<dyn Guide> {
        assert!(
            self.0.swap(true, Ordering::Relaxed),
            "a test has the engine's thread panic"
        );
        Box::new(Free)
    }
}

/// Allows every token.
struct Free;

impl Guide for Free {
    fn allowed(&mut self) -> Result<Vec<u32>, String> {
        Ok(vec![u32::MAX; 16])
    }

    fn take(&mut self, _token: u32) -> Result<bool, String> {
        Ok(false)
    }
}

/// What the engine's thread cannot tell, because it is gone.
#[test]
fn an_engine_whose_thread_has_panicked_is_replaced() {
    let client = failing(&plans());
    let long = Request {
        max_tokens: 300,
        ..cold(3)
    };
    let expected = answer(&mut alone(), long.clone());
    let reading = submit(&client, vec![long.clone(); 4]);
    let guided = Request {
        grammar: Some(Arc::new(Panicking::default())),
        ..cold(4)
    };
    let guided = submit_one(&client, guided);
    for one in reading {
        assert_eq!(one.outcome().tokens, expected.tokens);
    }
    let expected = answer(&mut alone(), cold(4));
    assert_eq!(guided.outcome().tokens, expected.tokens);
    let running = (0..2).filter(|replica| client.engine(*replica).is_running());
    assert_eq!(running.count(), 1);
    assert_eq!(submit_one(&client, cold(1)).outcome().error, None);
}
