//! Which request's tokens are computed first: short prompts beside long ones, priorities, and that nobody starves.

use crate::engine_harness::{
    BLOCK, OPTIONS, Outcomes, answer, collect, engine, finish, limits, request, tokens,
};
use kimi_linear::engine::{Engine, Request, RequestId};

/// Steps until a request's first token.
fn steps_to_first_token(engine: &mut Engine, id: u64, outcomes: &mut Outcomes) -> usize {
    let key = (RequestId(id), 0);
    let mut steps = 0;
    while outcomes
        .get(&key)
        .is_none_or(|outcome| outcome.tokens.is_empty())
    {
        assert!(pollster::block_on(engine.step()), "it has not answered yet");
        collect(engine, outcomes);
        steps += 1;
    }
    steps
}

/// An engine that prefills eight prompts of 8,000 tokens, the first of which has begun.
fn beside_long_prompts() -> Engine {
    let blocks = 9 * (8_100 / BLOCK);
    let mut engine = engine("tiny-a", limits(9, 18, blocks), OPTIONS);
    for id in 0..8 {
        let long = request(tokens(id + 1, 8_000), 1);
        engine.submit(RequestId(id), long).unwrap();
    }
    for _ in 0..3 {
        assert!(pollster::block_on(engine.step()));
    }
    engine
}

#[test]
fn a_short_chat_has_its_first_token_within_two_prefill_pieces_of_long_prompts() {
    let short = request(tokens(99, 20), 2);
    let mut alone = engine("tiny-a", limits(1, 1, 4), OPTIONS);
    let expected = answer(&mut alone, short.clone());
    let mut engine = beside_long_prompts();
    let mut outcomes = Outcomes::new();
    engine.submit(RequestId(100), short).unwrap();
    let steps = steps_to_first_token(&mut engine, 100, &mut outcomes);
    assert!(steps <= 2, "after {steps} steps");
    assert!(pollster::block_on(engine.step()));
    collect(&mut engine, &mut outcomes);
    assert_eq!(outcomes[&(RequestId(100), 0)].said(), expected.said());
}

#[test]
fn a_long_prompt_goes_on_beside_an_endless_row_of_short_ones() {
    let mut engine = engine("tiny-a", limits(8, 16, 64), OPTIONS);
    let (long, prefilled_by_step) = (20 * BLOCK, 4 * BLOCK);
    engine
        .submit(RequestId(0), request(tokens(1, long), 1))
        .unwrap();
    let mut outcomes = Outcomes::new();
    let mut steps = 0;
    // Each of them alone is as long as a step allows.
    while !outcomes.contains_key(&(RequestId(0), 0)) {
        steps += 1;
        let short = request(tokens(100 + steps, prefilled_by_step), 1);
        engine.submit(RequestId(steps), short).unwrap();
        pollster::block_on(engine.step());
        collect(&mut engine, &mut outcomes);
    }
    let needed = (long / prefilled_by_step) as u64;
    assert!(
        steps > needed,
        "short prompts have had no step before it: {steps} steps"
    );
    assert!(
        steps <= 2 * needed + 2,
        "{steps} steps for {needed} segments"
    );
    for id in 1..=steps {
        engine.cancel(RequestId(id));
    }
    finish(&mut engine, &mut outcomes);
}

#[test]
fn a_lower_priority_value_is_admitted_and_prefilled_first() {
    let with = |id: u64, priority| Request {
        priority,
        ..request(tokens(id, 3 * BLOCK), 1)
    };
    // One at a time, and all of them at once in steps that hold a little more than one prompt.
    for sequences in [1, 4] {
        let mut engine = engine("tiny-a", limits(sequences, 8, 64), OPTIONS);
        for (id, priority) in [(1, 5), (2, -3), (3, 0), (4, 5)] {
            engine.submit(RequestId(id), with(id, priority)).unwrap();
        }
        let mut outcomes = Outcomes::new();
        let mut order: Vec<u64> = Vec::new();
        while order.len() < 4 {
            pollster::block_on(engine.step());
            collect(&mut engine, &mut outcomes);
            // Of those that end in the same step the first in order comes first.
            let mut ended: Vec<u64> = outcomes.keys().map(|(id, _)| id.0).collect();
            ended.retain(|id| !order.contains(id));
            order.extend(ended);
        }
        assert_eq!(order, [2, 3, 1, 4], "{sequences} at a time");
    }
}

#[test]
fn where_blocks_are_short_the_highest_value_leaves_the_device() {
    // Two answers of 60 tokens need 8 blocks; there are 6.
    let mut engine = engine("tiny-a", limits(2, 2, 6), OPTIONS);
    let with = |id: u64, priority| Request {
        priority,
        reuse: false,
        ..request(tokens(id, BLOCK), 3 * BLOCK)
    };
    engine.submit(RequestId(1), with(1, 7)).unwrap();
    engine.submit(RequestId(2), with(2, 0)).unwrap();
    let mut outcomes = Outcomes::new();
    let mut first = None;
    while first.is_none() {
        assert!(pollster::block_on(engine.step()));
        collect(&mut engine, &mut outcomes);
        first = outcomes
            .iter()
            .find_map(|((id, _), outcome)| outcome.reason.map(|_| id.0));
    }
    assert_eq!(first, Some(2), "the first to arrive has the higher value");
    assert!(engine.preemptions() > 0, "blocks were enough for both");
    finish(&mut engine, &mut outcomes);
    assert_eq!(outcomes.len(), 2);
    let mut alone = engine_alone();
    for id in [1, 2] {
        let expected = answer(&mut alone, with(id, 0));
        assert_eq!(outcomes[&(RequestId(id), 0)].said(), expected.said());
    }
}

fn engine_alone() -> Engine {
    engine("tiny-a", limits(1, 1, 8), OPTIONS)
}
