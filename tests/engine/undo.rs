//! Undone writes: the edit itself, what it leaves alone, and that no edited state or latent is ever cached.

use kimi_linear::engine::{Engine, Event, Request, RequestId, UndoWrite};
use kimi_linear::error::{EngineError, Error};
use kimi_linear::model::{TraceChoice, TraceFrame, TraceHead};

use crate::engine_harness::{
    BLOCK, OPTIONS, Outcomes, answer, answers, engine, finish, limits, request, tokens,
};

const HEAD: TraceHead = TraceHead { layer: 2, head: 1 };

fn roomy() -> Engine {
    engine("tiny-a", limits(2, 12, 64), OPTIONS)
}

fn undo(token: usize, head: Option<TraceHead>) -> Vec<UndoWrite> {
    vec![UndoWrite { token, head }]
}

/// The frames of a request that runs alone, traced from the start.
fn frames(engine: &mut Engine, request: Request) -> Vec<TraceFrame> {
    let traced = Request {
        trace: Some(TraceChoice {
            kda: Some(HEAD),
            ..TraceChoice::default()
        }),
        trace_from: Some(0),
        ..request
    };
    engine.submit(RequestId(7), traced).unwrap();
    while pollster::block_on(engine.step()) {}
    let frame = |(_, event)| match event {
        Event::Trace { frame, .. } => Some(*frame),
        Event::Failed(error) => panic!("{error}"),
        _ => None,
    };
    engine.take_events().filter_map(frame).collect()
}

#[test]
fn the_state_is_decayed_but_not_written() {
    let prompt = tokens(1, 20);
    let plain = frames(&mut roomy(), request(prompt.clone(), 3));
    for (token, head, undone) in [
        (9, Some(HEAD), true),
        (0, Some(HEAD), true),
        (9, None, true),
        (9, Some(TraceHead { layer: 2, head: 0 }), false),
    ] {
        let edited = Request {
            undo: undo(token, head),
            ..request(prompt.clone(), 3)
        };
        let edited = frames(&mut roomy(), edited);
        assert_eq!(edited.len(), plain.len());
        // Up to the token everything is as it was, to the bit.
        for (edited, plain) in edited.iter().zip(&plain[..token]) {
            assert_eq!(edited.state, plain.state);
        }
        let after = edited[token].state.as_ref().unwrap();
        assert_eq!(after.undone, undone, "{head:?}");
        let expected: Vec<f32> = if undone {
            let before = token
                .checked_sub(1)
                .map(|at| plain[at].state.as_ref().unwrap());
            (0..after.state.len())
                .map(|i| after.decay[i / after.width] * before.map_or(0.0, |b| b.state[i]))
                .collect()
        } else {
            plain[token].state.as_ref().unwrap().state.clone()
        };
        for (found, expected) in after.state.iter().zip(&expected) {
            assert!(
                (found - expected).abs() < 1e-6,
                "{found} against {expected}"
            );
        }
        // Tokens after it run from the edited state.
        let [edited, plain] =
            [&edited, &plain].map(|frames| frames[token + 1].state.as_ref().unwrap());
        // Another head of the same layer has no part in this one's state.
        assert_eq!(edited.state == plain.state, !undone);
        assert!(!edited.undone);
    }
}

#[test]
fn nothing_of_an_edited_sequence_is_cached() {
    let prompt = tokens(2, 5 * BLOCK);
    let longer = [prompt.clone(), tokens(3, 7)].concat();
    let edited = Request {
        undo: undo(3 * BLOCK + 2, None),
        ..request(prompt.clone(), 5)
    };
    let mut fresh = roomy();
    let expected = answer(&mut fresh, request(longer.clone(), 5));
    // On an empty cache nothing is stored.
    let mut engine = roomy();
    let changed = answer(&mut engine, edited.clone());
    assert_eq!((engine.occupancy().blocks, engine.held()), (0, (0, 0)));
    let after = answer(&mut engine, request(longer.clone(), 5));
    assert_eq!(after.usage.cached_tokens, 0);
    assert_eq!(after.said(), expected.said());
    // After a plain run the edited one begins with its prefix, up to the token at most, and leaves the cache as it was.
    let mut engine = roomy();
    let plain = answer(&mut engine, request(prompt.clone(), 5));
    let again = answer(&mut engine, request(prompt.clone(), 5));
    let occupancy = engine.occupancy();
    let hit = answer(&mut engine, edited);
    assert!(hit.usage.cached_tokens <= 3 * BLOCK + 2);
    assert_eq!(engine.occupancy().blocks, occupancy.blocks);
    assert_ne!(
        hit.said(),
        plain.said(),
        "the edit shows in the log-probabilities"
    );
    assert_eq!(changed.tokens.len(), hit.tokens.len());
    let third = answer(&mut engine, request(prompt, 5));
    assert_eq!(third.said(), again.said());
    assert_eq!(third.usage, again.usage);
}

#[test]
fn others_in_the_batch_are_not_edited() {
    let other = request(tokens(5, 30), 6);
    let expected = answer(&mut roomy(), other.clone());
    let mut engine = roomy();
    let edited = Request {
        undo: vec![
            UndoWrite {
                token: 4,
                head: None,
            },
            UndoWrite {
                token: 11,
                head: Some(HEAD),
            },
        ],
        ..request(tokens(6, 30), 6)
    };
    let alone = answer(&mut roomy(), edited.clone());
    engine.submit(RequestId(1), other).unwrap();
    engine.submit(RequestId(2), edited).unwrap();
    let mut outcomes = Outcomes::new();
    finish(&mut engine, &mut outcomes);
    assert_eq!(outcomes[&(RequestId(1), 0)].said(), expected.said());
    assert_eq!(outcomes[&(RequestId(2), 0)].said(), alone.said());
}

#[test]
fn all_samples_go_on_from_the_edited_state() {
    let edited = Request {
        undo: undo(29, None),
        ..request(tokens(6, 30), 4)
    };
    let one = answer(&mut roomy(), edited.clone());
    let both = answers(
        &mut roomy(),
        Request {
            samples: 2,
            ..edited
        },
    );
    assert_eq!(both.len(), 2);
    for answer in &both {
        assert_eq!(answer.said(), one.said());
    }
}

#[test]
fn what_cannot_be_undone_is_refused() {
    let mut engine = roomy();
    let head = |layer, head| Some(TraceHead { layer, head });
    for (token, at, what) in [
        (30, None, "token"),
        (usize::MAX, None, "token"),
        (3, head(3, 0), "KDA layer"),
        (3, head(99, 0), "KDA layer"),
        (3, head(2, 2), "KDA head"),
    ] {
        let request = Request {
            undo: undo(token, at),
            ..request(tokens(6, 30), 4)
        };
        match engine.submit(RequestId(1), request) {
            Err(EngineError::Undo { what: found, .. }) => assert_eq!(found, what),
            other => panic!("{other:?}"),
        }
    }
    let edited = Request {
        undo: undo(3, None),
        ..request(tokens(6, 30), 4)
    };
    let exported = engine.export(RequestId(2), edited.clone(), 1);
    assert_eq!(exported.err(), Some(EngineError::UndoTransfer));
    let header = engine.cache_header(edited.prompt.clone());
    match engine.import(RequestId(3), edited, &header) {
        Err(Error::Engine(EngineError::UndoTransfer)) => {}
        other => panic!("{other:?}"),
    }
    assert!(engine.is_idle());
}
