//! The library's front: a model in three lines has the engine's results.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::ops::ControlFlow;

use kimi_linear::backend::{BackendKind, open};
use kimi_linear::engine::{FinishReason, Sampling};
use kimi_linear::llm::{Generation, LlmFiles, LlmOptions, Piece};
use kimi_linear::tokenizer::Chat;
use kimi_linear::{Error, Llm};

const FACT: &str = "The red box holds 7. Now the red box holds 3. What does the red box hold?";

fn demo() -> Llm {
    let files = LlmFiles::demo().unwrap();
    let backend = open(BackendKind::Cpu, None).unwrap();
    files
        .load(backend, &LlmOptions::one(1024), &mut |_, _| {
            ControlFlow::Continue(())
        })
        .unwrap()
}

#[test]
fn it_answers_whole_and_piece_by_piece() {
    let llm = demo();
    let greedy = Generation::default();
    let whole = llm.chat(FACT, &greedy).unwrap();
    assert_eq!(whole.text, "The red box holds 3.");
    assert_eq!(whole.finish_reason, FinishReason::Stop);
    assert_eq!(whole.usage.prompt_tokens, whole.prompt_tokens.len());
    let (mut text, mut tokens) = (String::new(), Vec::new());
    for piece in llm.stream(Chat::user(FACT), &greedy).unwrap() {
        match piece.unwrap() {
            Piece::Text { token, text: more } => {
                tokens.push(token);
                text.push_str(&more);
            }
            Piece::End { text: more, .. } => text.push_str(&more),
        }
    }
    assert_eq!((text, tokens), (whole.text.clone(), whole.tokens.clone()));
    // The same prompt as ids.
    let ids = llm.generate(whole.prompt_tokens.clone(), &greedy).unwrap();
    assert_eq!(ids.tokens, whole.tokens);
    let short = Generation {
        max_tokens: 2,
        ..greedy.clone()
    };
    let short = llm.chat(FACT, &short).unwrap();
    assert_eq!(short.finish_reason, FinishReason::Length);
    assert_eq!(short.tokens, whole.tokens[..2]);
    let stop = Generation {
        stop: vec![" holds".to_owned()],
        ..greedy
    };
    assert_eq!(llm.chat(FACT, &stop).unwrap().text, "The red box");
}

#[test]
fn a_stream_that_is_dropped_frees_the_engine() {
    let llm = demo();
    let long = Generation {
        max_tokens: 900,
        ignore_eos: true,
        ..Generation::default()
    };
    let mut stream = llm.stream("The", &long).unwrap();
    assert!(stream.next().unwrap().is_ok());
    drop(stream);
    assert_eq!(
        llm.chat(FACT, &Generation::default()).unwrap().text,
        "The red box holds 3."
    );
    let status = llm.engine().status().unwrap();
    assert_eq!((status.running, status.waiting), (0, 0));
}

#[test]
fn texts_are_scored_and_memories_move() {
    let llm = demo();
    let score = llm.score(FACT).unwrap();
    assert!(
        score.predicted > 10 && score.perplexity().unwrap() > 1.0,
        "{score:?}"
    );
    let told = llm.chat(FACT, &Generation::default()).unwrap();
    let snapshot = llm.snapshot(told.prompt_tokens.clone()).unwrap();
    let other = demo();
    other.restore(snapshot).unwrap();
    // One token more than the snapshot has: something must be left to compute.
    let longer = [told.prompt_tokens.clone(), told.tokens[..1].to_vec()].concat();
    let again = other.generate(longer, &Generation::default()).unwrap();
    assert_eq!(again.tokens, told.tokens[1..]);
    assert_eq!(again.usage.cached_tokens, told.prompt_tokens.len());
}

#[test]
fn what_cannot_be_is_refused() {
    let missing = Llm::open("no/such/folder").map(|_| ()).unwrap_err();
    assert!(missing.to_string().contains("no/such/folder"), "{missing}");
    let llm = demo();
    let wrong = Generation {
        sampling: Sampling {
            temperature: -1.0,
            ..Sampling::GREEDY
        },
        ..Generation::default()
    };
    let error = llm.chat(FACT, &wrong).unwrap_err();
    assert!(matches!(error, Error::Engine(_)), "{error}");
    let long = llm
        .generate(vec![1; 2000], &Generation::default())
        .unwrap_err();
    assert!(long.to_string().contains("2000 tokens"), "{long}");
    let stopped = LlmFiles::demo().unwrap().load(
        open(BackendKind::Cpu, None).unwrap(),
        &LlmOptions::one(64),
        &mut |_, _| ControlFlow::Break(()),
    );
    assert!(matches!(stopped, Err(Error::LoadStopped)));
}
