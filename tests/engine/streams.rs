//! 64 streams at a time, some of which are cancelled at a random token: the others have the tokens and log-probabilities that they
//! have alone, to the bit.
//!
//! `KIMI_LINEAR_STREAM_SECONDS` sets how long each engine is kept busy at least; it is 0 in `make test`.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::ahead::Asynchronous;
use crate::engine_harness::{
    OPTIONS, Outcome, Outcomes, answer, drawn, engine_on, limits, request, take, tokens,
};
use crate::wrapped::Wrapped;
use kimi_linear::backend::Backend;
use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::engine::{EngineHandle, EngineOptions, Event, Request, RequestId, Sampling};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

const STREAMS: usize = 64;
/// Complete answers of each engine, at least.
const INNOCENT: usize = 200;
const KINDS: u64 = 32;

/// A request of this kind. Its prompt is cut equally in every run, because it does not use the prefix cache.
fn of_kind(kind: u64) -> Request {
    let sampling = if kind.is_multiple_of(2) {
        drawn(kind)
    } else {
        Sampling::GREEDY
    };
    Request {
        sampling,
        reuse: false,
        ..request(
            tokens(kind, 5 + kind as usize),
            8 + (kind * 7 % 25) as usize,
        )
    }
}

/// Takes the events of one request until it ends, or until `cut` tokens have come, when it is cancelled.
fn follow(handle: &EngineHandle, request: Request, cut: usize) -> Option<Outcome> {
    let answer = handle.answer(request);
    let mut outcomes = Outcomes::new();
    let mut count = 0;
    while let Some(event) = answer.next() {
        count += usize::from(matches!(event, Event::Token { .. }));
        if count >= cut {
            return None;
        }
        take([(RequestId(0), event)], &mut outcomes);
    }
    outcomes.remove(&(RequestId(0), 0))
}

fn busy(backend: Box<dyn Backend>, options: EngineOptions, expected: &BTreeMap<u64, Outcome>) {
    let seconds = std::env::var("KIMI_LINEAR_STREAM_SECONDS");
    let seconds = seconds.map_or(0, |seconds| seconds.parse().unwrap());
    let seed = crate::seeds::printed(crate::seeds::drawn());
    let until = Instant::now() + Duration::from_secs(seconds);
    // More slots than sequences, so that all of them can have a second one.
    let limits = limits(STREAMS, 2 * STREAMS + 6, 6 * STREAMS);
    let handle = EngineHandle::start(engine_on(backend, "tiny-a", limits, options)).unwrap();
    let (innocent, cancelled) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let failures = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for stream in 0..STREAMS {
            let (handle, innocent, cancelled, failures) =
                (&handle, &innocent, &cancelled, &failures);
            scope.spawn(move || {
                let mut rng = SmallRng::seed_from_u64(seed.wrapping_add(stream as u64));
                while innocent.load(Ordering::Relaxed) < INNOCENT || Instant::now() < until {
                    let kind = rng.random_range(0..KINDS);
                    let cut = match rng.random_range(0..3) {
                        0 => rng.random_range(1..8),
                        _ => usize::MAX,
                    };
                    match follow(handle, of_kind(kind), cut) {
                        Some(found) => {
                            if found.said() != expected[&kind].said() {
                                failures.lock().unwrap().push((kind, found));
                            }
                            innocent.fetch_add(1, Ordering::Relaxed);
                        }
                        None => {
                            cancelled.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                }
            });
        }
    });
    println!("seed {seed}: {innocent:?} complete answers, {cancelled:?} cancelled");
    let failures = failures.into_inner().unwrap();
    assert!(failures.is_empty(), "seed {seed}: {failures:#?}");
    assert!(cancelled.into_inner() >= STREAMS);
    handle.clear_cache().unwrap();
    let left = handle.occupancy().unwrap();
    assert_eq!((left.slots, left.blocks), (0, 0), "seed {seed}");
}

/// The answers of every kind, each alone.
fn alone(open: impl Fn() -> Box<dyn Backend>) -> BTreeMap<u64, Outcome> {
    let options = EngineOptions {
        async_scheduling: false,
        ..OPTIONS
    };
    let mut engine = engine_on(open(), "tiny-a", limits(1, 4, 16), options);
    let answers = (0..KINDS).map(|kind| (kind, answer(&mut engine, of_kind(kind))));
    answers.collect()
}

/// With steps ahead of their tokens, and without.
fn both(open: impl Fn() -> Box<dyn Backend>) {
    let expected = alone(&open);
    for async_scheduling in [true, false] {
        let options = EngineOptions {
            async_scheduling,
            ..OPTIONS
        };
        busy(open(), options, &expected);
    }
}

#[test]
fn streams_beside_cancelled_ones_answer_as_alone() {
    let fed = Asynchronous::default();
    both(|| Box::new(Wrapped::new(Box::new(CpuBackend::new()), fed.clone())));
    // Steps ahead were fed tokens on the device. How many depends on when prompts come, since no step runs ahead beside one.
    assert!(fed.count() > STREAMS / 2, "{}", fed.count());
}

#[cfg(feature = "wgpu")]
#[test]
fn streams_on_wgpu_beside_cancelled_ones_answer_as_alone() {
    use kimi_linear::backend::wgpu;
    let open = || -> Box<dyn Backend> {
        let backend = wgpu::WgpuBackend::with_options(wgpu::Options::default());
        Box::new(backend.unwrap_or_else(|error| {
            panic!("{error}. These tests need a Vulkan driver: apt-get install mesa-vulkan-drivers libvulkan1")
        }))
    };
    busy(open(), OPTIONS, &alone(open));
}
