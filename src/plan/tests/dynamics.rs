//! The scheduler when conditions change, compared with the same plan held fixed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::time::Duration;

use kimi_linear_plan::fit::capacity;
use kimi_linear_plan::lengths::LogNormal;
use kimi_linear_plan::model::{Averages, Demand, Deployment};
use kimi_linear_plan::plan::Task;
use kimi_linear_plan::profile::Profile;
use kimi_linear_plan::replay::{
    Arrivals, LinkChange, LinkOptions, Outcome, Policy, Sample, Setup, run,
};
use kimi_linear_plan::route::LinkState;
use kimi_linear_plan::search;
use kimi_linear_plan::trace::{Generate, Shape, Trace};

fn deployment(link: f64) -> Deployment {
    Deployment {
        prfaas: Profile::open("1t-h200").unwrap(),
        prfaas_nodes: 4,
        local: Profile::open("1t-h20").unwrap(),
        local_nodes: 8,
        link_bits_per_second: link,
    }
}

fn trace(rate: f64, count: usize, shape: Shape) -> Trace {
    let generate = Generate {
        lengths: LogNormal::case_study().lengths().unwrap(),
        output: 1024,
        count,
        rate,
        shape,
        seed: 7,
    };
    generate.trace().unwrap()
}

/// The plan for the case study's prompts.
fn planned(deployment: Deployment) -> Setup {
    let lengths = LogNormal::case_study().lengths().unwrap();
    let demand = Demand {
        lengths: &lengths,
        output_tokens: 1024.0,
        averages: Averages::OfWork,
    };
    let found = search::best(&deployment, demand);
    Setup::new(deployment, found.threshold, found.split)
}

fn fixed(setup: &Setup) -> Setup {
    Setup {
        policy: Policy::Fixed {
            link: LinkState::Ample,
        },
        ..setup.clone()
    }
}

fn replayed(trace: &Trace, setup: &Setup) -> Outcome {
    run(trace, setup, &mut |_| {}).unwrap()
}

fn between(outcome: &Outcome, from: f64, to: f64) -> impl Iterator<Item = &Sample> {
    outcome
        .series
        .iter()
        .filter(move |sample| (from..to).contains(&sample.at))
}

/// A link of 20 Gbit/s with a fifth of that rate from minute 10 to minute 20, under 1.4 req/s: the plan needs 5.4 Gbit/s, and
/// with 4 the best threshold still serves 1.56 req/s.
#[test]
fn a_link_that_degrades_for_ten_minutes_is_lived_with_and_recovered_from() {
    let trace = trace(1.4, 4500, Shape::Steady);
    let at = |minutes: u64, factor| LinkChange {
        at: Duration::from_secs(60 * minutes),
        factor,
    };
    let mut setup = planned(deployment(20e9));
    setup.changes = vec![at(10, 0.2), at(20, 1.0)];
    let ours = replayed(&trace, &setup);
    let static_plan = replayed(&trace, &fixed(&setup));

    // Without a reaction the queue grows for ten minutes. With the scheduler it is a few seconds long.
    let seconds = |bytes: u64| bytes as f64 * 8.0 / 20e9;
    let (bounded, piled) = (
        seconds(ours.peaks.link_bytes),
        seconds(static_plan.peaks.link_bytes),
    );
    assert!(piled > 30.0, "{piled}");
    assert!(bounded < 0.25 * piled, "{bounded} of {piled}");
    assert!(ours.peaks.local_prefill < 60, "{:?}", ours.peaks);
    assert!(
        ours.ttft.p99 < 0.2 * static_plan.ttft.p99,
        "{:?} {:?}",
        ours.ttft,
        static_plan.ttft
    );

    // The threshold changed, and returned.
    let before = setup.threshold;
    let highest = between(&ours, 660.0, 1200.0)
        .map(|s| s.threshold)
        .max()
        .unwrap();
    assert!(f64::from(highest) > 1.5 * f64::from(before), "{highest}");
    let estimate = between(&ours, 900.0, 1200.0).map(|s| s.link_bits_per_second);
    assert!(estimate.fold(f64::INFINITY, f64::min) < 4.5e9);
    // To the best threshold of the current split: a node may have been converted meanwhile.
    let lengths = LogNormal::case_study().lengths().unwrap();
    let demand = Demand {
        lengths: &lengths,
        output_tokens: 1024.0,
        averages: Averages::OfWork,
    };
    for sample in between(&ours, 1500.0, 3000.0) {
        let best = search::best_threshold(&setup.deployment, demand, sample.split).threshold;
        let off = f64::from(sample.threshold) / f64::from(best) - 1.0;
        assert!(off.abs() < 0.25, "{sample:?}, {best}");
        assert!(sample.link_bits_per_second > 19e9, "{sample:?}");
    }
    assert!(between(&ours, 1500.0, 3000.0).all(|s| s.local_waiting < 30 && s.prfaas_waiting < 30));
}

/// The same with a link so slow that it stops for a while: nothing is lost, and all requests are served.
#[test]
fn a_link_that_stands_still_for_a_minute_loses_nothing() {
    let trace = trace(1.5, 1500, Shape::Steady);
    let mut setup = planned(deployment(20e9));
    setup.changes = vec![
        LinkChange {
            at: Duration::from_secs(300),
            factor: 0.0,
        },
        LinkChange {
            at: Duration::from_secs(360),
            factor: 1.0,
        },
    ];
    let outcome = replayed(&trace, &setup);
    assert_eq!(outcome.requests, 1500);
    assert!(
        outcome.ttft.max > 55.0,
        "those on the way waited: {:?}",
        outcome.ttft
    );
    let end = outcome.series.last().unwrap();
    assert!(end.link_bytes < 4e9, "{end:?}");
}

/// Answers become twice as long: prefill nodes are converted to decode nodes; with the fixed plan queues grow without limit.
#[test]
fn a_change_of_traffic_turns_nodes() {
    let mut all = Trace::new(512);
    let mut offset = Duration::ZERO;
    for output in [768u32, 1536] {
        let part = Generate {
            lengths: LogNormal::case_study().lengths().unwrap(),
            output,
            count: 6000,
            rate: 2.4,
            shape: Shape::Steady,
            seed: 3,
        };
        let part = part.trace().unwrap();
        for request in part.requests() {
            all.push(offset + request.at, request.tokens, request.output, &[]);
        }
        offset += part.requests().last().unwrap().at;
    }
    let deployment = deployment(100e9);
    let lengths = LogNormal::case_study().lengths().unwrap();
    let demand = |output_tokens| Demand {
        lengths: &lengths,
        output_tokens,
        averages: Averages::OfWork,
    };
    let first = search::best(&deployment, demand(768.0));
    let then = search::best(&deployment, demand(1536.0));
    assert!(then.split.decode > first.split.decode);
    let setup = Setup::new(deployment, first.threshold, first.split);
    let ours = replayed(&all, &setup);
    assert_eq!(ours.split, then.split, "{:?}", ours.conversions);
    let turned = (then.split.decode - first.split.decode) as usize;
    assert_eq!(ours.conversions.len(), turned, "no node is converted twice");
    let held = replayed(&all, &fixed(&setup));
    assert!(
        ours.ttft.p90 < 0.6 * held.ttft.p90,
        "{:?} {:?}",
        ours.ttft,
        held.ttft
    );
}

/// Bursts of three times the calm rate, above the plan's throughput: queues grow and are processed.
#[test]
fn bursts_are_worked_off() {
    let bursts = Shape::Bursts {
        factor: 3.0,
        every: Duration::from_secs(600),
        lasting: Duration::from_secs(60),
    };
    let trace = trace(2.0, 6000, bursts);
    let setup = planned(deployment(100e9));
    let ours = replayed(&trace, &setup);
    assert_eq!(ours.requests, 6000);
    let emptied = ours
        .series
        .iter()
        .filter(|sample| sample.at % 600.0 > 400.0)
        .all(|sample| sample.local_waiting < 10 && sample.prfaas_waiting < 10);
    assert!(emptied);
}

/// At capacity the scheduler reaches the equations' throughput, with the mean of the prompts' work.
#[test]
fn the_model_is_reached_at_capacity() {
    let trace = trace(3.0, 12_000, Shape::Steady);
    let mut setup = planned(deployment(100e9));
    setup.arrivals = Arrivals::Saturated { in_flight: 400 };
    let lengths = LogNormal::case_study().lengths().unwrap();
    let demand = Demand {
        lengths: &lengths,
        output_tokens: 1024.0,
        averages: Averages::OfWork,
    };
    let promised = search::best(&setup.deployment, demand).stages.throughput;
    let reached = replayed(&trace, &setup).throughput;
    assert!(
        (0.95..1.02).contains(&(reached / promised)),
        "{reached} of {promised}"
    );
}

/// Requests whose lengths change from short to long and back, as a file in Azure's format.
fn changing(name: &str) -> Trace {
    let mut csv = String::from("TIMESTAMP,ContextTokens,GeneratedTokens\n");
    for i in 0..2400u32 {
        let long = i / 400 % 2 == 1;
        // A pseudo-random number for each request, from an odd multiplier.
        let spread = i.wrapping_mul(2_654_435_761) >> 16;
        let tokens = if long {
            8_000 + spread % 40_000
        } else {
            200 + spread % 4_000
        };
        let second = i / 2;
        csv.push_str(&format!(
            "2023-11-16 18:{:02}:{:02}.{}000000,{tokens},400\n",
            second / 60,
            second % 60,
            i % 2 * 5
        ));
    }
    let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::write(&path, csv).unwrap();
    Trace::read(&path).unwrap()
}

#[test]
fn a_trace_that_changes_is_planned_by_replays_of_its_windows() {
    const IN_FLIGHT: usize = 60;
    let trace = changing("replayed.csv");
    let task = Task {
        deployment: deployment(100e9),
        homogeneous_nodes: 12,
        link: LinkOptions::default(),
        lengths: trace.uncached().unwrap(),
        output_tokens: trace.output_tokens(),
        averages: Averages::OfWork,
    };
    let whole = task.ways().unwrap();
    let found = task.ways_of(&trace, IN_FLIGHT).unwrap();
    assert_eq!(whole.len(), found.len());
    for ((way, deployment, whole), (_, _, found)) in whole.iter().zip(&found) {
        let setup = Setup::new(deployment.clone(), whole.threshold, whole.split);
        let replayed = |one: &search::Found| {
            capacity(&trace, &setup, one.threshold, one.split, IN_FLIGHT).unwrap()
        };
        // The predicted throughput is that of the replay, and no less than the equation's own solution.
        assert_eq!(found.throughput, replayed(found), "{way:?}");
        assert!(found.throughput >= replayed(whole), "{way:?}");
    }
    let (whole, found) = (whole[0].2, found[0].2);
    assert!(
        found.throughput
            > 1.02
                * capacity(
                    &trace,
                    &Setup::new(deployment(100e9), whole.threshold, whole.split),
                    whole.threshold,
                    whole.split,
                    IN_FLIGHT,
                )
                .unwrap(),
        "{whole:?} {found:?}"
    );
}

#[test]
fn windows_cannot_serve_more_than_the_whole() {
    let trace = changing("windows.csv");
    let deployment = deployment(100e9);
    let lengths = trace.uncached().unwrap();
    let demand = Demand {
        lengths: &lengths,
        output_tokens: trace.output_tokens(),
        averages: Averages::OfWork,
    };
    for size in [1, 7, 120, 5000] {
        let windows = trace.windows(size).unwrap();
        assert_eq!(
            windows.iter().map(|w| w.lengths.count()).sum::<usize>(),
            2400
        );
        for (found, whole) in search::by_split(&deployment, demand, &windows)
            .iter()
            .zip(search::by_split(&deployment, demand, &[]))
        {
            assert!(
                found.throughput <= whole.throughput * (1.0 + 1e-12),
                "{size}: {found:?} {whole:?}"
            );
            if size == 5000 {
                assert_eq!(found.threshold, whole.threshold);
            }
        }
    }
}
