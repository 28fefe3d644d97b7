//! The engine in its thread: events in order, several clients at a time, cancellation at any point.

use std::sync::Arc;

use crate::engine_harness::common::reference;
use crate::engine_harness::{OPTIONS, answer, drawn, engine, limits, request, tokens};
use kimi_linear::engine::{
    Answer, EngineHandle, Event, FinishReason, Output, OutputProcessor, Request, Sampling, Usage,
};
use kimi_linear::tokenizer::Tokenizer;

fn start() -> EngineHandle {
    EngineHandle::start(engine("tiny-a", limits(2, 6, 32), OPTIONS)).unwrap()
}

/// The tokens of a request for one answer, and how it ended.
fn read(answer: &Answer) -> (Vec<u32>, Option<FinishReason>) {
    let (mut tokens, mut end) = (Vec::new(), None);
    while let Some(event) = answer.next() {
        assert!(end.is_none(), "an event after the end");
        match event {
            Event::Token { id, .. } => tokens.push(id),
            Event::Finished { reason, .. } => end = Some(reason),
            Event::Failed(error) => panic!("{error}"),
            _ => {}
        }
    }
    (tokens, end)
}

#[test]
fn events_come_in_order() {
    let answer = start().answer(request(tokens(1, 70), 3));
    let mut names = Vec::new();
    let mut done = 0;
    while let Some(event) = answer.next() {
        names.push(match event {
            Event::Queued { ahead } => {
                assert_eq!(ahead, 0);
                "queued"
            }
            Event::Prefill { done: now, cached } => {
                assert!(now > done && cached == 0);
                done = now;
                "prefill"
            }
            Event::Token { .. } => "token",
            Event::Finished { usage, .. } => {
                assert_eq!(
                    (
                        usage.prompt_tokens,
                        usage.cached_tokens,
                        usage.generated_tokens
                    ),
                    (70, 0, 3)
                );
                "finished"
            }
            other => panic!("{other:?}"),
        });
    }
    names.dedup();
    assert_eq!(names, ["queued", "prefill", "token", "finished"]);
    assert_eq!(done, 70);
}

#[test]
fn clients_do_not_disturb_each_other() {
    let handle = start();
    let mut alone = engine("tiny-a", limits(1, 4, 32), OPTIONS);
    let expected: Vec<Vec<u32>> = (0..6)
        .map(|seed| answer(&mut alone, request(tokens(seed, 30 + seed as usize), 12)).tokens)
        .collect();
    std::thread::scope(|scope| {
        for (seed, expected) in expected.iter().enumerate() {
            let handle = handle.clone();
            scope.spawn(move || {
                let answer = handle.answer(request(tokens(seed as u64, 30 + seed), 12));
                assert_eq!(
                    read(&answer),
                    (expected.clone(), Some(FinishReason::Length))
                );
            });
        }
        // One that is dropped in the middle.
        let handle = handle.clone();
        scope.spawn(move || {
            let answer = handle.answer(request(tokens(99, 40), 300));
            while !matches!(answer.next(), Some(Event::Token { .. })) {}
        });
    });
    // The memory of the dropped one is free at the next step.
    let start = std::time::Instant::now();
    loop {
        let occupancy = handle.occupancy().unwrap();
        if occupancy.slots == occupancy.device_checkpoints {
            break;
        }
        assert!(
            start.elapsed().as_secs() < 30,
            "more than checkpoints are held: {occupancy:?}"
        );
    }
}

#[test]
fn a_cancelled_answer_ends_and_others_go_on() {
    let handle = start();
    let answer = handle.answer(request(tokens(1, 20), 400));
    let other = handle.answer(request(tokens(2, 20), 5));
    while !matches!(answer.next(), Some(Event::Token { .. })) {}
    answer.cancel();
    assert_eq!(read(&answer).1, Some(FinishReason::Cancelled));
    assert_eq!(read(&other).1, Some(FinishReason::Length));
    // Cancelled before it could be divided into its samples.
    let several = handle.answer(Request {
        samples: 3,
        ..request(tokens(3, 500), 5)
    });
    several.cancel();
    let ends = std::iter::from_fn(|| several.next())
        .filter(|event| matches!(event, Event::Finished { .. }));
    assert_eq!(ends.count(), 3);
}

#[test]
fn what_cannot_run_fails_by_an_event() {
    let answer = start().answer(request(Vec::new(), 5));
    let Some(Event::Failed(error)) = answer.next() else {
        panic!("no failure")
    };
    assert!(error.to_string().starts_with("the prompt is empty"));
    assert!(answer.next().is_none());
}

/// An answer's tokens and text, how it ended, and its usage.
fn read_text(answer: &Answer<Output>) -> (Vec<u32>, String, FinishReason, Usage) {
    let (mut tokens, mut text) = (Vec::new(), String::new());
    while let Some(output) = answer.next() {
        text.push_str(&output.text());
        match output.event {
            Event::Token { id, .. } => tokens.push(id),
            Event::Finished { reason, usage, .. } => return (tokens, text, reason, usage),
            Event::Failed(error) => panic!("{error}"),
            _ => {}
        }
    }
    panic!("no end")
}

#[test]
fn a_stop_string_ends_the_answer_and_is_never_shown() {
    let handle = start();
    let tokenizer = Arc::new(Tokenizer::from_dir(&reference("tiny-a")).unwrap());
    let letters = tokenizer
        .encode_ordinary("abcdefghijklmnopqrstuvwxyz")
        .unwrap();
    assert_eq!(letters.len(), 26);
    let ascii = |seed| Request {
        // Letters only, so that every token is a character.
        sampling: Sampling {
            logit_bias: letters.iter().map(|id| (*id, 40.0)).collect(),
            ..drawn(seed)
        },
        ..request(tokens(9, 20), 40)
    };
    let processor = OutputProcessor::new(&tokenizer);
    for seed in 0..8 {
        let (whole_tokens, whole, ..) = read_text(&handle.generate(ascii(seed), processor.clone()));
        assert_eq!(whole.len(), 40, "{whole}");
        let stop = whole[11..14].to_owned();
        let at = whole.find(&stop).unwrap();
        let stops = ["ZZ".to_owned(), stop];
        let processor = processor.clone().stop_strings(&stops).unwrap();
        let answer = handle.generate(ascii(seed), processor);
        let (tokens, text, reason, usage) = read_text(&answer);
        assert_eq!((text.as_str(), reason), (&whole[..at], FinishReason::Stop));
        assert_eq!(tokens, whole_tokens[..at + 3]);
        // No token was computed after it.
        assert_eq!(usage.generated_tokens, at + 3);
        assert!(answer.next().is_none());
    }
    let status = handle.status().unwrap();
    assert_eq!((status.running, status.waiting), (0, 0));
}

#[test]
fn a_stop_string_in_the_last_token_that_may_come_is_the_reason() {
    let handle = start();
    let tokenizer = Arc::new(Tokenizer::from_dir(&reference("tiny-a")).unwrap());
    let letter = tokenizer.encode_ordinary("q").unwrap()[0];
    let only = Request {
        sampling: Sampling {
            logit_bias: vec![(letter, 1e9)],
            ..Sampling::GREEDY
        },
        ..request(tokens(9, 20), 3)
    };
    for (stop, shown, expected) in [
        ("qqqq", "qqq", FinishReason::Length),
        ("qqq", "", FinishReason::Stop),
    ] {
        let processor = OutputProcessor::new(&tokenizer);
        let processor = processor.stop_strings(&[stop.to_owned()]).unwrap();
        let (tokens, text, reason, usage) = read_text(&handle.generate(only.clone(), processor));
        assert_eq!((text.as_str(), reason), (shown, expected));
        assert_eq!((tokens.len(), usage.generated_tokens), (3, 3));
    }
}
