//! Many requests at a time: each answer is the one that the request would have alone.

use crate::engine_harness::{
    BLOCK, OPTIONS, Outcomes, answer, answers, collect, drawn, engine, finish, limits, request,
    tokens,
};
use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::config::ModelConfig;
use kimi_linear::engine::{Engine, EngineOptions, FinishReason, Request, RequestId, Sampling};
use kimi_linear::model::Model;

/// Sixteen requests of different lengths, greedy and sampled from few and many candidates.
fn sixteen() -> Vec<Request> {
    let lengths = [
        1, 200, 17, 33, 65, 5, 130, 16, 48, 90, 2, 31, 64, 150, 12, 81,
    ];
    let one = |(i, length): (usize, usize)| {
        // Reading back rows for one request must not change the samples of another.
        let sampling = match i % 4 {
            0 | 2 => Sampling::GREEDY,
            1 => drawn(i as u64),
            _ => Sampling {
                top_k: 3 + i,
                top_p: 1.0,
                ..drawn(i as u64)
            },
        };
        let sampling = if i == 14 {
            Sampling {
                presence_penalty: 1.0,
                ..sampling
            }
        } else {
            sampling
        };
        let request = request(tokens(i as u64 + 1, length), 12 + 5 * (i % 5));
        Request {
            sampling,
            logprobs: Some(i % 5),
            ..request
        }
    };
    lengths.into_iter().enumerate().map(one).collect()
}

#[test]
fn sixteen_at_once_answer_as_each_alone() {
    for name in ["tiny-a", "tiny-128"] {
        let mut alone = engine(name, limits(1, 4, 64), OPTIONS);
        let cold = |request: Request| Request {
            reuse: false,
            ..request
        };
        let expected: Vec<_> = sixteen()
            .into_iter()
            .map(|r| answer(&mut alone, cold(r)))
            .collect();
        // Too few slots and blocks for all; with and without time slices.
        for (sequences, slots, blocks, quantum) in
            [(16, 16, 40, 1 << 20), (6, 7, 20, 1 << 20), (3, 3, 16, 4)]
        {
            let options = EngineOptions { quantum, ..OPTIONS };
            let mut engine = engine(name, limits(sequences, slots, blocks), options);
            for (i, request) in sixteen().into_iter().enumerate() {
                engine.submit(RequestId(i as u64), request).unwrap();
            }
            let mut outcomes = Outcomes::new();
            finish(&mut engine, &mut outcomes);
            assert_eq!(outcomes.len(), 16);
            for ((id, _), outcome) in &outcomes {
                assert_eq!(
                    outcome.said(),
                    expected[id.0 as usize].said(),
                    "{name}, request {id:?}, {blocks} blocks"
                );
            }
            assert!(
                blocks > 20 || engine.preemptions() > 0,
                "{blocks} blocks were enough"
            );
            engine.clear_cache();
            let left = engine.occupancy();
            assert_eq!((left.slots, left.blocks, left.host_bytes), (0, 0, 0));
        }
    }
}

#[test]
fn samples_share_their_prompt() {
    for (sequences, slots) in [(4, 8), (1, 1), (2, 2)] {
        let mut engine = engine("tiny-a", limits(sequences, slots, 32), OPTIONS);
        let prompt = tokens(7, 37);
        let one = |samples| Request {
            samples,
            sampling: drawn(5),
            ..request(prompt.clone(), 10)
        };
        let four = answers(&mut engine, one(4));
        assert_eq!(four.len(), 4);
        engine.clear_cache();
        assert_eq!(engine.occupancy().blocks, 0);
        let single = answer(&mut engine, one(1));
        assert_eq!(
            four[0].said(),
            single.said(),
            "the first sample is that of a request for one"
        );
        assert!(
            four.iter()
                .all(|answer| answer.tokens.len() == 10 && answer.usage.prompt_tokens == 37)
        );
        assert_ne!(four[0].tokens, four[1].tokens);
        engine.clear_cache();
        // The others are the same with any pools.
        assert_eq!(answers(&mut engine, one(4)), four);
    }
}

#[test]
fn cancelled_at_any_token_everything_is_free_at_the_next_step() {
    let mut engine = engine("tiny-a", limits(2, 6, 32), OPTIONS);
    for samples in [1, 3] {
        for steps in 0..9 {
            let id = RequestId(steps);
            engine
                .submit(
                    id,
                    Request {
                        samples,
                        ..request(tokens(3, 150), 20)
                    },
                )
                .unwrap();
            for _ in 0..steps {
                pollster::block_on(engine.step());
            }
            engine.cancel(id);
            assert!(!pollster::block_on(engine.step()), "nothing is left to do");
            assert!(engine.is_idle());
            let mut outcomes = Outcomes::new();
            collect(&mut engine, &mut outcomes);
            assert_eq!(outcomes.len(), samples, "every answer ends");
            assert!(
                outcomes
                    .values()
                    .all(|outcome| outcome.reason == Some(FinishReason::Cancelled))
            );
            engine.clear_cache();
            let left = engine.occupancy();
            assert_eq!((left.slots, left.blocks, left.host_bytes), (0, 0, 0));
        }
    }
}

#[test]
fn a_long_answer_makes_room_for_those_that_wait() {
    let options = EngineOptions {
        quantum: 4,
        ..OPTIONS
    };
    let mut engine = engine("tiny-a", limits(1, 2, 32), options);
    engine
        .submit(RequestId(1), request(tokens(1, 20), 60))
        .unwrap();
    engine
        .submit(RequestId(2), request(tokens(2, 20), 3))
        .unwrap();
    let mut outcomes = Outcomes::new();
    for _ in 0..16 {
        pollster::block_on(engine.step());
    }
    collect(&mut engine, &mut outcomes);
    assert!(
        outcomes[&(RequestId(2), 0)].reason.is_some(),
        "the short one is done"
    );
    assert!(
        outcomes[&(RequestId(1), 0)].reason.is_none(),
        "the long one is not"
    );
    finish(&mut engine, &mut outcomes);
    let mut alone = crate::engine_harness::engine("tiny-a", limits(1, 2, 32), OPTIONS);
    let expected = answer(&mut alone, request(tokens(1, 20), 60));
    assert_eq!(outcomes[&(RequestId(1), 0)].said(), expected.said());
}

#[test]
fn an_answer_that_is_stopped_ends_alone() {
    let mut engine = engine("tiny-a", limits(3, 8, 32), OPTIONS);
    let three = Request {
        samples: 3,
        sampling: drawn(5),
        ..request(tokens(9, 20), 12)
    };
    let whole = answers(&mut engine, three.clone());
    engine.clear_cache();
    engine.submit(RequestId(1), three).unwrap();
    let (mut outcomes, mut stopped) = (Outcomes::new(), false);
    // Before it has answers there is none to stop.
    engine.stop(RequestId(1), 0);
    loop {
        let more = pollster::block_on(engine.step());
        collect(&mut engine, &mut outcomes);
        let second = outcomes.get(&(RequestId(1), 1));
        if !stopped && second.is_some_and(|second| second.tokens.len() == 4) {
            stopped = true;
            engine.stop(RequestId(1), 1);
            collect(&mut engine, &mut outcomes);
            let second = &outcomes[&(RequestId(1), 1)];
            assert_eq!(second.reason, Some(FinishReason::Stop));
            assert_eq!(second.usage.generated_tokens, 4);
            // It has already ended.
            engine.stop(RequestId(1), 1);
        }
        if !more {
            break;
        }
    }
    for (sample, whole) in whole.iter().enumerate() {
        let outcome = &outcomes[&(RequestId(1), sample)];
        match sample {
            1 => assert_eq!(outcome.tokens, whole.tokens[..4]),
            _ => assert_eq!(outcome.said(), whole.said()),
        }
    }
    // Its memory is free, and its state is cached for requests that continue from it.
    let occupancy = engine.occupancy();
    assert_eq!(occupancy.slots, occupancy.device_checkpoints);
    let next = [tokens(9, 20), whole[1].tokens[..4].to_vec(), vec![1]].concat();
    let next = answer(&mut engine, request(next, 1));
    assert_eq!(next.usage.cached_tokens, 20 + 4 - 1);
}

#[test]
fn stop_ids_and_limits_end_answers() {
    let mut engine = engine("tiny-a", limits(1, 2, 4), OPTIONS);
    let prompt = tokens(4, 10);
    let whole = answer(&mut engine, request(prompt.clone(), 8));
    let at = whole
        .tokens
        .iter()
        .position(|token| *token == whole.tokens[5])
        .unwrap();
    let stopped = answer(
        &mut engine,
        Request {
            stop_ids: vec![whole.tokens[5]],
            ..request(prompt.clone(), 8)
        },
    );
    assert_eq!(
        (stopped.tokens.as_slice(), stopped.reason),
        (&whole.tokens[..at], Some(FinishReason::Stop))
    );
    // A context of four blocks: its last token is sampled, but cannot run.
    let full = answer(&mut engine, request(prompt.clone(), 1000));
    assert_eq!(
        (full.tokens.len(), full.reason),
        (4 * BLOCK - 10 + 1, Some(FinishReason::Length))
    );
    let nothing = answer(&mut engine, request(prompt, 0));
    assert_eq!(
        (nothing.tokens.len(), nothing.reason),
        (0, Some(FinishReason::Length))
    );
}

#[test]
fn requests_that_cannot_run_are_refused() {
    let mut engine = engine("tiny-a", limits(1, 2, 4), OPTIONS);
    let refusals = [
        (request(Vec::new(), 1), "the prompt is empty"),
        (
            request(tokens(1, 65), 1),
            "the prompt has 65 tokens, but the context holds 64",
        ),
        (request(vec![512], 1), "token id 512 at position 0"),
        (
            Request {
                samples: 0,
                ..request(vec![1], 1)
            },
            "n should be from 1 to 128",
        ),
        (
            Request {
                turn_ends: vec![2],
                ..request(vec![1], 1)
            },
            "a turn ends at token 2",
        ),
    ];
    for (request, message) in refusals {
        let error = engine
            .submit(RequestId(1), request)
            .unwrap_err()
            .to_string();
        assert!(error.starts_with(message), "{error}");
    }
    engine.submit(RequestId(1), request(vec![1], 1)).unwrap();
    assert!(
        engine.submit(RequestId(1), request(vec![1], 1)).is_err(),
        "one name twice"
    );
}

/// An engine with weights that the backend generates, without a checkpoint.
#[test]
fn an_engine_over_random_weights_serves_requests() {
    let config = ModelConfig::from_file(
        &crate::engine_harness::common::reference("tiny-a").join("config.json"),
    )
    .unwrap();
    let random = |seed| {
        let backend = Box::new(CpuBackend::new());
        let model = Model::random(&config, seed, backend, limits(2, 4, 16), &mut |_| {}).unwrap();
        Engine::new(model, OPTIONS)
    };
    let (mut engine, prompt) = (random(1), tokens(1, 40));
    let first = answer(&mut engine, request(prompt.clone(), 8));
    assert_eq!(first.tokens.len(), 8);
    let again = answer(&mut random(1), request(prompt.clone(), 8));
    assert_eq!(first, again, "the same seed is the same model");
    // Another seed is another model, and the error names it.
    let snapshot = pollster::block_on(engine.snapshot(&prompt)).unwrap();
    random(1).restore(snapshot.clone()).unwrap();
    let error = random(2).restore(snapshot).unwrap_err().to_string();
    assert!(
        error.starts_with("the snapshot's model should be "),
        "{error}"
    );
}
