//! Hostile and broken clients of every kind, in rounds, beside clients that behave. The answers of these must not change, and at the
//! end the server must hold what it held at the beginning: memory, state slots, blocks, descriptors, threads.
//!
//! `make test` runs two rounds, the first without clients that behave. `make abuse` sets `KIMI_LINEAR_ABUSE_MINUTES`, and rounds follow
//! each other for that long.

mod bystanders;
mod connections;
mod messages;
mod requests;
mod target;

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};

use self::bystanders::Bystanders;
use self::target::Target;
use crate::seeds;

/// The variable that says for how many minutes rounds follow each other.
const MINUTES: &str = "KIMI_LINEAR_ABUSE_MINUTES";

/// Rounds without it, after the first.
const ROUNDS: usize = 1;

/// Attacks at the same time.
const TOGETHER: usize = 3;

/// Ends when its clients are gone. The number is a seed.
type Attack = fn(Arc<Target>, u64) -> BoxFuture<'static, ()>;

const ATTACKS: [(&str, Attack); 14] = [
    ("half heads", |target, seed| {
        connections::half_heads(target, seed).boxed()
    }),
    ("half bodies", |target, seed| {
        connections::half_bodies(target, seed).boxed()
    }),
    ("slow writers", |target, seed| {
        connections::slow_writers(target, seed).boxed()
    }),
    ("slow readers", |target, _| {
        connections::slow_readers(target).boxed()
    }),
    ("left streams", |target, seed| {
        connections::left_streams(target, seed).boxed()
    }),
    ("ten thousand connections", |target, seed| {
        connections::crowd(target, seed).boxed()
    }),
    ("bytes that are not HTTP", |target, seed| {
        messages::not_http(target, seed).boxed()
    }),
    ("pipelined requests", |target, _| {
        messages::pipelined(target).boxed()
    }),
    ("huge bodies", |target, _| {
        messages::huge_bodies(target).boxed()
    }),
    ("drawn requests", |target, seed| {
        requests::drawn(target, seed).boxed()
    }),
    ("schemas", |target, _| requests::schemas(target).boxed()),
    ("cancelled requests", |target, seed| {
        requests::cancelled(target, seed).boxed()
    }),
    ("large batches", |target, _| {
        requests::large_batches(target).boxed()
    }),
    ("wrong paths and keys", |target, _| {
        requests::wrong_paths_and_keys(target).boxed()
    }),
];

/// Every attack once, in a drawn order.
async fn round(target: &Arc<Target>, draw: &mut SmallRng) {
    let mut order = ATTACKS;
    order.shuffle(draw);
    for together in order.chunks(TOGETHER) {
        let attacks = together.iter().map(|(name, attack)| {
            let (target, seed) = (Arc::clone(target), draw.random());
            async move {
                let ended = tokio::spawn(attack(target, seed)).await;
                assert!(ended.is_ok(), "the attack by {name} found a fault");
            }
        });
        futures_util::future::join_all(attacks.collect::<Vec<_>>()).await;
    }
}

/// The time that is asked for, if any.
fn asked() -> Option<Duration> {
    let minutes: u64 = std::env::var(MINUTES)
        .ok()?
        .parse()
        .expect("KIMI_LINEAR_ABUSE_MINUTES is a number");
    Some(Duration::from_secs(60 * minutes))
}

/// Rounds for that time, or [`ROUNDS`]; how many there were.
async fn rounds(target: &Arc<Target>, draw: &mut SmallRng, time: Option<Duration>) -> usize {
    let (begun, mut done) = (Instant::now(), 0);
    while time.map_or(done < ROUNDS, |time| begun.elapsed() < time) {
        round(target, draw).await;
        done += 1;
    }
    done
}

#[test]
fn hostile_clients_change_no_answer_and_leave_nothing_behind() {
    rlimit::increase_nofile_limit(u64::MAX).unwrap();
    let mut draw = SmallRng::seed_from_u64(seeds::printed(seeds::drawn()));
    let target = Arc::new(Target::start());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let known = runtime.block_on(bystanders::known(&target));
    target.settle();
    let begin = target.held();
    let half = asked().map(|time| time / 2);
    runtime.block_on(rounds(&target, &mut draw, half));
    // The pools of the engine are touched and responses are stored for minutes, so what is left at half time and at the end
    // is only compared where a time is asked for.
    match half {
        Some(_) => target.settle_to(&begin),
        None => target.settle(),
    }
    let warm = target.held();
    let running = Bystanders::start(&runtime, &target, known);
    let done = runtime.block_on(rounds(&target, &mut draw, half));
    let answers = running.stop(&runtime);
    // Ten seconds idle end a thread that did a blocking task for the others, and give memory back.
    target.settle_to(&begin);
    let end = target.held();
    println!(
        "{done} rounds of {} attacks; {answers} answers of bystanders",
        ATTACKS.len()
    );
    println!("at first {begin:?}, half way {warm:?}, at the end {end:?}");
    assert!(answers >= 3 * done, "{answers} answers of bystanders");
    assert!(
        half.is_none() || end.resident_kib < warm.resident_kib + warm.resident_kib / 8 + 8 * 1024,
        "memory: {warm:?}, then {end:?}"
    );
    target.stop();
}
