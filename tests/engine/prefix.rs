//! Prefix reuse: a hit has the same bits as a run that is cut at the same positions, and exists only where a state is cached.

use crate::engine_harness::{
    BLOCK, OPTIONS, Outcome, answer, answers, engine, limits, load, request, tokens, without_engine,
};
use kimi_linear::engine::{Engine, EngineOptions, Request};

/// Asserts that an answer has the bits of the model's results when its prompt's segments end at exactly these positions. One
/// that begins inside a block is also cut at the block's end.
#[track_caller]
fn same_as_segments(name: &str, prompt: &[u32], ends: &[usize], answer: &Outcome) {
    let mut most = limits(1, 1, 64);
    most.step.tokens = 256;
    let mut model = load(name, most);
    let mut segments = Vec::new();
    let mut start = 0_usize;
    for end in ends {
        let border = start.next_multiple_of(BLOCK).clamp(start, *end);
        segments.extend(
            [start..border, border..*end]
                .into_iter()
                .filter(|segment| !segment.is_empty()),
        );
        start = *end;
    }
    let segments = &segments;
    let expected = without_engine(&mut model, prompt, segments, answer.tokens.len());
    let (tokens, bits, ..) = answer.said();
    assert_eq!((tokens, bits), (expected.0.as_slice(), expected.1));
}

fn chain(parts: &[&[u32]]) -> Vec<u32> {
    parts.concat()
}

fn roomy(name: &str) -> Engine {
    engine(name, limits(2, 12, 64), OPTIONS)
}

#[test]
fn a_longer_prompt_goes_on_inside_a_block() {
    for name in ["tiny-a", "tiny-128"] {
        let mut engine = roomy(name);
        let prompt = tokens(1, 38);
        let first = answer(&mut engine, request(prompt.clone(), 8));
        assert_eq!(first.usage.cached_tokens, 0);
        same_as_segments(name, &prompt, &[38], &first);
        // It differs from the first one's answer: the checkpoint at the prompt's end, six tokens inside a block.
        let longer = chain(&[&prompt, &tokens(2, 20)]);
        let second = answer(&mut engine, request(longer.clone(), 8));
        assert_eq!(second.usage.cached_tokens, 38);
        same_as_segments(name, &longer, &[38, 58], &second);
        // Again, after the second has written past the prompt's end, to a block of its own.
        let other = chain(&[&prompt, &tokens(3, 20)]);
        let third = answer(&mut engine, request(other.clone(), 8));
        assert_eq!(third.usage.cached_tokens, 38);
        same_as_segments(name, &other, &[38, 58], &third);
    }
}

#[test]
fn a_prompt_repeated_whole_runs_from_its_last_whole_block() {
    for (length, cached) in [
        (38, 32),
        (32, 16),
        (33, 32),
        (15, 0),
        (16, 0),
        (17, 16),
        (100, 96),
    ] {
        let mut engine = roomy("tiny-a");
        let prompt = tokens(length as u64, length);
        let first = answer(&mut engine, request(prompt.clone(), 6));
        let second = answer(&mut engine, request(prompt.clone(), 6));
        assert_eq!(second.usage.cached_tokens, cached, "{length} tokens");
        assert_eq!(first.said(), second.said(), "{length} tokens");
        let cold = answer(
            &mut engine,
            Request {
                reuse: false,
                ..request(prompt, 6)
            },
        );
        assert_eq!(
            first.said(),
            cold.said(),
            "a whole block is no other cut than none"
        );
    }
}

#[test]
fn the_next_turn_goes_on_from_the_answer() {
    let mut engine = roomy("tiny-a");
    let prompt = tokens(5, 21);
    let first = answer(&mut engine, request(prompt.clone(), 12));
    // The last token of the answer was sampled, but has not run.
    let reached = 21 + 11;
    let next = chain(&[&prompt, &first.tokens, &tokens(6, 9)]);
    let second = answer(&mut engine, request(next.clone(), 8));
    assert_eq!(second.usage.cached_tokens, reached);
    let mut ends = vec![21];
    ends.extend(22..=reached);
    ends.push(next.len());
    same_as_segments("tiny-a", &next, &ends, &second);
    // An answer that is sent back as other tokens: the hit is at the prompt's end.
    let retold = chain(&[&prompt, &tokens(7, 12), &tokens(6, 9)]);
    let third = answer(&mut engine, request(retold.clone(), 8));
    assert_eq!(third.usage.cached_tokens, 21);
    same_as_segments("tiny-a", &retold, &[21, retold.len()], &third);
}

#[test]
fn latents_without_a_state_are_no_hit() {
    let mut engine = roomy("tiny-a");
    let prompt = tokens(8, 60);
    let _ = answer(&mut engine, request(prompt.clone(), 2));
    // 40 common tokens, but states are only at 48, at 60, and at the answer's end.
    let parted = chain(&[&prompt[..40], &tokens(9, 20)]);
    let second = answer(&mut engine, request(parted.clone(), 4));
    assert_eq!(second.usage.cached_tokens, 0);
    same_as_segments("tiny-a", &parted, &[60], &second);
    // 50 common tokens: the state at 48.
    let later = chain(&[&prompt[..50], &tokens(9, 20)]);
    let third = answer(&mut engine, request(later.clone(), 4));
    assert_eq!(third.usage.cached_tokens, 48);
    same_as_segments("tiny-a", &later, &[70], &third);
}

#[test]
fn turns_of_a_prompt_are_cuts_and_checkpoints() {
    let mut engine = roomy("tiny-a");
    let prompt = tokens(10, 70);
    let cut = |prompt: &[u32], turns: &[usize]| Request {
        turn_ends: turns.to_vec(),
        ..request(prompt.to_vec(), 6)
    };
    let first = answer(&mut engine, cut(&prompt, &[21, 50]));
    same_as_segments("tiny-a", &prompt, &[21, 50, 70], &first);
    for (common, cached) in [(20, 0), (30, 21), (55, 50)] {
        let other = chain(&[&prompt[..common], &tokens(11, 30)]);
        let hit = answer(&mut engine, cut(&other, &[]));
        assert_eq!(hit.usage.cached_tokens, cached);
        let ends = match cached {
            50 => vec![21, 50, other.len()],
            _ => vec![cached, other.len()],
        };
        same_as_segments("tiny-a", &other, &ends, &hit);
    }
}

#[test]
fn long_prompts_leave_checkpoints_on_the_way() {
    let mut engine = roomy("tiny-a");
    let prompt = tokens(12, 200);
    let first = answer(&mut engine, request(prompt.clone(), 2));
    same_as_segments("tiny-a", &prompt, &[200], &first);
    for (common, cached) in [(63, 0), (65, 64), (140, 128), (195, 192)] {
        let other = chain(&[&prompt[..common], &tokens(13, 20)]);
        let hit = answer(&mut engine, request(other.clone(), 4));
        assert_eq!(hit.usage.cached_tokens, cached, "{common} tokens in common");
        same_as_segments("tiny-a", &other, &[other.len()], &hit);
    }
}

#[test]
fn what_left_the_device_comes_back_as_it_was() {
    // Memory for one sequence and little more, with host memory and without.
    for (host_bytes, hits) in [(64 << 20, true), (0, false)] {
        let options = EngineOptions {
            host_bytes,
            ..OPTIONS
        };
        let mut engine = engine("tiny-a", limits(1, 2, 8), options);
        let prompts: Vec<Vec<u32>> = (0..6).map(|seed| tokens(20 + seed, 70)).collect();
        for prompt in &prompts {
            let first = answer(&mut engine, request(prompt.clone(), 4));
            same_as_segments("tiny-a", prompt, &[70], &first);
        }
        let occupancy = engine.occupancy();
        assert!(occupancy.evictions > 6);
        assert_eq!(occupancy.host_checkpoints > 4, hits);
        for prompt in &prompts[..5] {
            let longer = chain(&[prompt, &tokens(30, 10)]);
            let second = answer(&mut engine, request(longer.clone(), 6));
            if hits {
                assert_eq!(second.usage.cached_tokens, 70);
                same_as_segments("tiny-a", &longer, &[70, 80], &second);
            } else {
                assert!(second.usage.cached_tokens < 70);
            }
        }
    }
}

#[test]
fn samples_go_on_from_a_hit() {
    let mut engine = roomy("tiny-a");
    let prompt = tokens(40, 30);
    let _ = answer(&mut engine, request(prompt.clone(), 1));
    let longer = chain(&[&prompt, &tokens(41, 10)]);
    let both = answers(
        &mut engine,
        Request {
            samples: 2,
            ..request(longer.clone(), 9)
        },
    );
    assert_eq!(both[0].usage.cached_tokens, 30);
    assert_eq!(both[0].said(), both[1].said(), "both are greedy");
    same_as_segments("tiny-a", &longer, &[30, 40], &both[0]);
}

#[test]
fn a_request_may_stay_out_of_the_cache() {
    let mut engine = roomy("tiny-a");
    let prompt = tokens(50, 3 * BLOCK);
    let cold = || Request {
        reuse: false,
        ..request(prompt.clone(), 4)
    };
    for _ in 0..2 {
        assert_eq!(answer(&mut engine, cold()).usage.cached_tokens, 0);
    }
    assert_eq!(engine.occupancy().blocks, 0);
}
