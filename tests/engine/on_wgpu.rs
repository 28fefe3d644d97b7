//! The engine on wgpu: properties that hold on the CPU hold there, and memory moves between the two.

use crate::engine_harness::{
    BLOCK, OPTIONS, Outcomes, answer, collect, drawn, engine, engine_on, finish, limits, load_on,
    request, tokens, without_engine,
};
use kimi_linear::backend::{Backend, wgpu};
use kimi_linear::cache::Snapshot;
use kimi_linear::engine::{Engine, Request, RequestId, Sampling};
use pollster::block_on;

/// Bound on differences of log-probabilities between two f32 backends.
const BOUND: f32 = 1e-4;

fn backend() -> Box<dyn Backend> {
    let backend = wgpu::WgpuBackend::with_options(wgpu::Options::default());
    Box::new(backend.unwrap_or_else(|error| {
        panic!("{error}. These tests need a Vulkan driver: apt-get install mesa-vulkan-drivers libvulkan1")
    }))
}

fn on_wgpu(name: &str, sequences: usize, slots: usize, blocks: usize) -> Engine {
    engine_on(backend(), name, limits(sequences, slots, blocks), OPTIONS)
}

#[test]
fn requests_at_once_answer_as_each_alone() {
    let requests: Vec<Request> = [15, 31, 14, 33, 1, 48]
        .into_iter()
        .enumerate()
        .map(|(i, length)| {
            let sampling = if i % 2 == 0 {
                Sampling::GREEDY
            } else {
                drawn(i as u64)
            };
            Request {
                sampling,
                ..request(tokens(i as u64 + 1, length), 20 + i)
            }
        })
        .collect();
    let mut alone = on_wgpu("tiny-a", 1, 2, 16);
    let cold = |request: &Request| Request {
        reuse: false,
        ..request.clone()
    };
    let expected: Vec<_> = requests
        .iter()
        .map(|r| answer(&mut alone, cold(r)))
        .collect();
    let mut engine = on_wgpu("tiny-a", 3, 4, 5);
    for (i, request) in requests.into_iter().enumerate() {
        engine.submit(RequestId(i as u64), request).unwrap();
    }
    let mut outcomes = Outcomes::new();
    finish(&mut engine, &mut outcomes);
    collect(&mut engine, &mut outcomes);
    for ((id, _), outcome) in &outcomes {
        assert_eq!(outcome.error, None);
        assert_eq!(
            outcome.said(),
            expected[id.0 as usize].said(),
            "request {id:?}"
        );
    }
    assert!(engine.preemptions() > 0);
    engine.clear_cache();
    let left = engine.occupancy();
    assert_eq!((left.slots, left.blocks, left.host_bytes), (0, 0, 0));
}

#[test]
fn a_hit_is_a_run_cut_at_the_same_places() {
    for name in ["tiny-a", "tiny-128"] {
        let mut engine = on_wgpu(name, 1, 6, 32);
        let prompt = tokens(1, 38);
        let _ = answer(&mut engine, request(prompt.clone(), 4));
        let longer = [prompt.clone(), tokens(2, 20)].concat();
        let inside = answer(&mut engine, request(longer.clone(), 6));
        let again = answer(&mut engine, request(prompt.clone(), 6));
        assert_eq!(
            (inside.usage.cached_tokens, again.usage.cached_tokens),
            (38, 32)
        );
        // Through host memory and back.
        for seed in 10..16 {
            let _ = answer(&mut engine, request(tokens(seed, 90), 2));
        }
        assert!(engine.occupancy().host_checkpoints > 0);
        let host = answer(&mut engine, request(longer.clone(), 6));
        let mut model = load_on(backend(), name, limits(1, 1, 16));
        let border = 38_usize.next_multiple_of(BLOCK);
        let runs = [
            (&longer, vec![0..38, 38..border, border..58], &inside),
            (&prompt, vec![0..32, 32..38], &again),
            (&prompt, vec![0..16, 16..38], &again),
        ];
        for (prompt, segments, found) in runs {
            let expected = without_engine(&mut model, prompt, &segments, 6);
            let (tokens, bits, ..) = found.said();
            assert_eq!(
                (tokens, bits),
                (expected.0.as_slice(), expected.1),
                "{name}, {segments:?}"
            );
        }
        assert_eq!(host.said().0, inside.said().0, "{name}");
    }
}

#[test]
fn memory_moves_between_the_processor_and_wgpu() {
    for name in ["tiny-a", "tiny-128"] {
        let on = |gpu: bool| {
            if gpu {
                on_wgpu(name, 1, 4, 16)
            } else {
                engine(name, limits(1, 4, 16), OPTIONS)
            }
        };
        let prompt = tokens(1, 38);
        let longer = [prompt.clone(), tokens(2, 9)].concat();
        for (from, to) in [(false, true), (true, false)] {
            let mut first = on(from);
            let _ = answer(&mut first, request(prompt.clone(), 0));
            let snapshot = block_on(first.snapshot(&prompt)).unwrap();
            let bytes = snapshot.to_bytes().unwrap();
            let expected = answer(&mut first, request(longer.clone(), 16));
            let mut second = on(to);
            second
                .restore(Snapshot::from_bytes(&bytes).unwrap())
                .unwrap();
            let found = answer(&mut second, request(longer.clone(), 16));
            assert_eq!(found.usage.cached_tokens, 38);
            // Token by token, up to the first whose two best candidates differ by less than the bound.
            for (i, (a, b)) in expected.logprobs.iter().zip(&found.logprobs).enumerate() {
                let (a, b) = (a.as_ref().unwrap(), b.as_ref().unwrap());
                let margin = a.top[0].1 - a.top[1].1;
                assert!(
                    (a.top[0].1 - b.top[0].1).abs() <= BOUND,
                    "{name}, token {i}: {a:?} and {b:?}"
                );
                if margin <= 2.0 * BOUND {
                    break;
                }
                assert_eq!(
                    expected.tokens[i], found.tokens[i],
                    "{name}, token {i}, margin {margin}"
                );
            }
        }
    }
}
