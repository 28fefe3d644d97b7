//! Bursts: invariants in every case, and the results for the paper's setting.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::time::Duration;

use kimi_linear_plan::burst::instance::{Form, Instance};
use kimi_linear_plan::burst::outcome::Outcome;
use kimi_linear_plan::burst::{Failure, Options, Policy, Setup, compare, run};
use kimi_linear_plan::lengths::{Lengths, LogNormal};
use kimi_linear_plan::trace::{Generate, Shape, Trace};
use proptest::prelude::*;

/// An instance with memory for 500 tokens of 1,000 bytes besides a megabyte of parameters.
fn small() -> Instance {
    let text = r#"{
        "name": "small", "source": "made up", "gpus": 1,
        "memory_bytes": 1500000, "parameter_bytes": 1000000,
        "cache": { "token_bytes": 1000, "sequence_bytes": 3000, "block_tokens": 16 },
        "network": { "bytes_per_second": 2e6, "hop_seconds": 0.0002, "host_bytes_per_second": 1e6 },
        "drop": [
            { "form": "layers", "droppable_bytes": 900000, "token_bytes": 100, "crossings": 1 },
            { "form": "experts", "droppable_bytes": 800000, "token_bytes": 300, "crossings": 8 }
        ],
        "prefill": [
            { "tokens": 16, "seconds": 0.012 }, { "tokens": 64, "seconds": 0.02 }, { "tokens": 256, "seconds": 0.06 }
        ],
        "decode": [
            { "sequences": 1, "context": 64, "seconds": 0.0101 }, { "sequences": 4, "context": 64, "seconds": 0.0105 },
            { "sequences": 4, "context": 256, "seconds": 0.012 }, { "sequences": 8, "context": 32, "seconds": 0.011 }
        ]
    }"#;
    Instance::parse("small", text).unwrap()
}

fn setup(instance: Instance, instances: u32, form: Form, policy: Policy) -> Setup {
    Setup {
        instance,
        instances,
        form,
        policy,
        options: Options {
            budget_tokens: 64,
            host_bytes: 400_000,
            ..Options::default()
        },
        failures: Vec::new(),
    }
}

/// Replays, and checks after every event that no instance uses more than its memory.
#[track_caller]
fn watched(trace: &Trace, setup: &Setup) -> Outcome {
    let memory = setup.instance.memory_bytes();
    let mut left = 0;
    let outcome = run(trace, setup, &mut |held| {
        for (caches, parameters) in held.caches.iter().zip(held.parameters) {
            assert!(caches + parameters <= memory, "{held:?} of {memory}");
        }
        left = held.caches.iter().sum();
    })
    .unwrap();
    assert_eq!(
        outcome.requests,
        trace.requests().len(),
        "requests are lost"
    );
    let tokens: u64 = trace.requests().iter().map(|r| u64::from(r.output)).sum();
    assert_eq!(outcome.output_tokens, tokens);
    let counts = outcome.counts;
    assert_eq!(counts.allocated_bytes, counts.freed_bytes, "bytes are lost");
    assert_eq!(left, 0, "an instance holds a cache of nobody");
    outcome
}

fn requests() -> impl Strategy<Value = Vec<(u32, u32, u32)>> {
    prop::collection::vec((0u32..12_000, 1u32..250, 1u32..180), 1..120)
}

fn trace_of(requests: &[(u32, u32, u32)]) -> Trace {
    let mut trace = Trace::new(16);
    for (at, tokens, output) in requests {
        trace.push(Duration::from_millis(u64::from(*at)), *tokens, *output, &[]);
    }
    trace.sort();
    trace
}

fn forms() -> impl Strategy<Value = Form> {
    prop_oneof![Just(Form::Layers), Just(Form::Experts)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn requests_and_bytes_are_conserved_within_the_budget(
        requests in requests(), instances in 1u32..9, form in forms(),
        look_ahead: bool, coordinated: bool, for_memory: bool, most in 1u32..9,
    ) {
        let trace = trace_of(&requests);
        for policy in Policy::ALL {
            let mut setup = setup(small(), instances, form, policy);
            let options = &mut setup.options;
            (options.look_ahead, options.coordinated) = (look_ahead, coordinated);
            (options.for_memory, options.most_members) = (for_memory, most);
            let outcome = watched(&trace, &setup);
            prop_assert!(outcome.ttft.max <= outcome.seconds && outcome.ttft.p50 > 0.0);
            if policy == Policy::Drop {
                prop_assert!(outcome.counts.largest_group as u32 <= most.max(1));
            }
        }
    }

    #[test]
    fn a_members_failure_loses_no_request(
        requests in requests(), instances in 2u32..9, form in forms(),
        failures in prop::collection::vec((0u32..20_000, 0u32..8), 1..4),
    ) {
        let trace = trace_of(&requests);
        for policy in Policy::ALL {
            let mut setup = setup(small(), instances, form, policy);
            setup.failures = failures.iter().map(|(at, instance)| Failure {
                at: Duration::from_millis(u64::from(*at)),
                // The last one does not fail.
                instance: instance % (instances - 1),
            }).collect();
            watched(&trace, &setup);
        }
    }
}

/// 100 requests within a second on four small instances, then one a second.
fn one_burst() -> Trace {
    let mut trace = Trace::new(16);
    for i in 0..100 {
        trace.push(Duration::from_millis(1000 + 10 * i), 100, 60, &[]);
    }
    for i in 0..60 {
        trace.push(Duration::from_secs(i), 100, 60, &[]);
    }
    trace.sort();
    trace
}

#[test]
fn the_same_trace_gives_the_same_result() {
    for policy in Policy::ALL {
        let setup = setup(small(), 4, Form::Layers, policy);
        let runs = [(); 2].map(|()| run(&one_burst(), &setup, &mut |_| {}).unwrap());
        assert_eq!(runs[0], runs[1]);
    }
}

#[test]
fn a_burst_drops_and_calm_restores_once() {
    for form in [Form::Layers, Form::Experts] {
        let setup = setup(small(), 4, form, Policy::Drop);
        let all = setup.instance.parameter_bytes();
        let mut held = Vec::new();
        let outcome = run(&one_burst(), &setup, &mut |now| {
            held.push((now.at, now.parameters.iter().sum::<u64>()));
        })
        .unwrap();
        let (_, least) = held.iter().min_by_key(|(_, bytes)| *bytes).unwrap();
        assert!(*least < 4 * all, "{form:?}: nothing was dropped");
        assert_eq!(
            held.last().unwrap().1,
            4 * all,
            "{form:?}: not all is restored"
        );
        // A copy is dropped at most once for one burst, and every group is restored once: no oscillation.
        let counts = outcome.counts;
        assert!((1..=3).contains(&counts.drops), "{form:?}: {counts:?}");
        assert!((1..=2).contains(&counts.restores), "{form:?}: {counts:?}");
        // Only a pipeline exchanges caches.
        assert_eq!(counts.exchanged_bytes > 0, form == Form::Layers);
        let kept = Setup {
            options: Options {
                restore: false,
                ..setup.options
            },
            ..setup
        };
        let kept = run(&one_burst(), &kept, &mut |_| {}).unwrap();
        assert_eq!((kept.counts.restores, kept.counts.restored_bytes), (0, 0));
    }
}

#[test]
fn a_member_of_a_group_fails_in_the_burst() {
    for form in [Form::Layers, Form::Experts] {
        for at in [1600, 1900, 2500] {
            let mut setup = setup(small(), 4, form, Policy::Drop);
            let calm = watched(&one_burst(), &setup);
            let grouped = calm.series.iter().any(|sample| sample.groups > 0);
            assert!(grouped, "the failure is of a single instance");
            setup.failures = vec![Failure {
                at: Duration::from_millis(at),
                instance: 1,
            }];
            let outcome = watched(&one_burst(), &setup);
            assert!(outcome.counts.recomputed > 0);
        }
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let message = |change: &dyn Fn(&mut Setup)| {
        let mut setup = setup(small(), 2, Form::Layers, Policy::Drop);
        change(&mut setup);
        run(&one_burst(), &setup, &mut |_| {})
            .unwrap_err()
            .to_string()
    };
    let fail = |instance| Failure {
        at: Duration::ZERO,
        instance,
    };
    assert!(message(&|s| s.instances = 0).contains("no instance"));
    assert!(message(&|s| s.failures = vec![fail(2)]).contains("instance 2 fails"));
    assert!(
        message(&|s| s.failures = vec![fail(0), fail(1)]).contains("at least one without failure")
    );
    assert!(message(&|s| s.options.poll = Duration::ZERO).contains("above 0"));
    let setup = setup(small(), 2, Form::Layers, Policy::Drop);
    let long = run(&trace_of(&[(0, 400, 150)]), &setup, &mut |_| {}).unwrap_err();
    assert!(
        long.to_string().contains("a request of 400 and 150 tokens"),
        "{long}"
    );
}

/// Lengths with a mean, distributed as a lognormal of `sigma`: the paper has only means.
fn lengths(mean: f64, sigma: f64, high: u32) -> Lengths {
    let mu = mean.ln() - sigma * sigma / 2.0;
    let lognormal = LogNormal {
        mu,
        sigma,
        low: 16,
        high,
    };
    lognormal.lengths().unwrap()
}

/// Bursts of `factor` for `lasting` seconds in ten minutes, over twenty minutes with `calm` requests per second in addition.
fn bursts(prompts: f64, answers: f64, calm: f64, factor: f64, lasting: u64) -> Trace {
    let every = 600.0;
    let rate = calm * (1.0 + (factor - 1.0) * lasting as f64 / every);
    let generate = Generate {
        lengths: lengths(prompts, 0.8, 16_000),
        output: 1,
        count: (1200.0 * rate) as usize,
        rate,
        shape: Shape::Bursts {
            factor,
            every: Duration::from_secs_f64(every),
            lasting: Duration::from_secs(lasting),
        },
        seed: 1,
    };
    generate
        .trace()
        .unwrap()
        .redrawn(None, Some(&lengths(answers, 0.6, 4000)), 2)
}

fn compared(name: &str, instances: u32, trace: &Trace) -> [Outcome; 2] {
    let instance = Instance::open(name).unwrap();
    let form = instance.form();
    let setup = Setup {
        options: Options::default(),
        ..setup(instance, instances, form, Policy::Drop)
    };
    let outcomes = compare(trace, &setup, &[Policy::Recompute, Policy::Drop]).unwrap();
    <[Outcome; 2]>::try_from(outcomes).unwrap()
}

/// The paper's setting: eight A800 with the 14B model, its three data sets' mean lengths, arrivals that double for a minute
/// out of ten, and a mean demand under 60 % of memory. The paper measures a P99 of first tokens that is 12.7 to 72.2 times
/// better. That is not reached here: by this roofline computation is exhausted as soon as memory, and memory does not help
/// requests that wait for computation (docs/performance/bursts.md). It is 1.3 to 2 times better.
#[test]
fn with_the_papers_lengths_the_tail_is_better_but_not_by_an_order_of_magnitude() {
    for (prompts, answers, calm) in [
        (642.0, 262.0, 28.0),
        (1660.0, 373.0, 11.0),
        (5900.0, 499.0, 3.6),
    ] {
        let trace = bursts(prompts, answers, calm, 2.0, 60);
        let [recompute, drop] = compared("qwen2.5-14b-a800", 8, &trace);
        let memory = 8.0 * Instance::open("qwen2.5-14b-a800").unwrap().cache_bytes() as f64;
        assert!(recompute.mean_demand_bytes < 0.6 * memory);
        assert!(drop.counts.drops > 0 && drop.counts.restores > 0);
        let gain = recompute.ttft.p99 / drop.ttft.p99;
        assert!((1.2..2.5).contains(&gain), "{prompts} / {answers}: {gain}");
        assert!(drop.tpot.p50 < 1.25 * recompute.tpot.p50);
        assert!(drop.late[0] < recompute.late[0]);
    }
}

/// The same instances with answers that are long compared with prompts: memory is exhausted long before computation, and the
/// order of magnitude is reached, at a TPOT that is at most a quarter worse.
#[test]
fn with_long_answers_the_tail_is_better_by_an_order_of_magnitude() {
    for (factor, lasting) in [(2.5, 240), (3.0, 180)] {
        let trace = bursts(300.0, 1500.0, 8.0, factor, lasting);
        let [recompute, drop] = compared("qwen2.5-14b-a800", 8, &trace);
        let (before, after) = (recompute.ttft, drop.ttft);
        assert!(before.p99 > 10.0 * after.p99, "{before:?} {after:?}");
        assert!(before.p999 > 10.0 * after.p999, "{before:?} {after:?}");
        assert!(drop.tpot.p50 < 1.25 * recompute.tpot.p50);
    }
}

/// Two replicas of this mixture of experts, of which 96 % of the bytes are experts: no cache is exchanged, and each reads
/// half as many experts per step.
#[test]
fn dropped_experts_make_room_without_a_pipeline() {
    let trace = bursts(300.0, 1500.0, 8.0, 2.5, 120);
    let [recompute, drop] = compared("kimi-linear-48b-h200", 2, &trace);
    assert!(recompute.ttft.p99 > 10.0 * drop.ttft.p99);
    assert!(drop.tpot.p50 < 1.05 * recompute.tpot.p50);
    assert_eq!((drop.counts.exchanged_bytes, drop.bubbles), (0, 0.0));
}
