//! Properties that hold for every deployment, demand and trace.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::time::Duration;

use kimi_linear_plan::lengths::Lengths;
use kimi_linear_plan::model::{Averages, Costs, Demand, Deployment, Split, stages};
use kimi_linear_plan::profile::{Decode, Point, Profile};
use kimi_linear_plan::replay::{
    Arrivals, LinkChange, LinkOptions, Outcome, Policy, Served, Setup, run,
};
use kimi_linear_plan::route::{LinkState, Site};
use kimi_linear_plan::scheduler;
use kimi_linear_plan::search;
use kimi_linear_plan::trace::Trace;
use proptest::prelude::*;

prop_compose! {
    /// Any valid profile: costs that rise with the length, linear or not.
    fn profile()(
        steps in prop::collection::vec((1u64..40_000, 0u64..400_000_000, 0.0f64..3.0), 1..5),
        first in (1u64..2000, 1u64..200_000_000, 0.01f64..1.0),
        slots in 1u32..20,
        step_seconds in 0.005f64..0.1,
    ) -> Profile {
        let (tokens, bytes, seconds) = first;
        let mut points = vec![Point { tokens, bytes, seconds }];
        for (tokens, bytes, seconds) in steps {
            let last = points[points.len() - 1];
            points.push(Point {
                tokens: last.tokens + tokens,
                bytes: last.bytes + bytes,
                seconds: last.seconds + seconds,
            });
        }
        Profile::new("any", "made up", 8, points, Decode { slots, step_seconds }).unwrap()
    }
}

prop_compose! {
    fn deployment()(
        prfaas in profile(),
        local in profile(),
        prfaas_nodes in 1u32..5,
        local_nodes in 2u32..6,
        link_bits_per_second in 1e8f64..1e11,
    ) -> Deployment {
        Deployment { prfaas, prfaas_nodes, local, local_nodes, link_bits_per_second }
    }
}

/// Equation (6) from its definition, independent of the crate's code: partition, average, divide.
fn throughput(
    deployment: &Deployment,
    lengths: &[u32],
    output: f64,
    averages: Averages,
    t: u32,
    split: Split,
) -> f64 {
    let (long, short): (Vec<u32>, Vec<u32>) = lengths.iter().partition(|length| **length > t);
    let average = |of: &[u32], curve: &dyn Fn(f64) -> f64| -> f64 {
        let mean = |value: &dyn Fn(f64) -> f64| {
            of.iter().map(|l| value(f64::from(*l))).sum::<f64>() / of.len() as f64
        };
        match averages {
            Averages::OfLengths => curve(mean(&|l| l)),
            Averages::OfWork => mean(curve),
        }
    };
    let (prfaas, local) = (&deployment.prfaas, &deployment.local);
    let all = lengths.len() as f64;
    let decode = deployment.local.decode();
    let mut least = f64::from(split.decode * decode.slots) / (decode.step_seconds * output);
    if !long.is_empty() {
        let share = long.len() as f64 / all;
        let compute = f64::from(deployment.prfaas_nodes) / average(&long, &|l| prfaas.seconds(l));
        let link = deployment.link_bits_per_second / 8.0 / average(&long, &|l| prfaas.bytes(l));
        least = least.min(compute.min(link) / share);
    }
    if !short.is_empty() {
        let share = short.len() as f64 / all;
        let compute = f64::from(split.prefill) / average(&short, &|l| local.seconds(l));
        least = least.min(compute / share);
    }
    least
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_search_equals_exhaustive_search(
        deployment in deployment(),
        lengths in prop::collection::vec(1u32..60, 1..40),
        output in 1.0f64..2000.0,
        of_work: bool,
    ) {
        let averages = if of_work { Averages::OfWork } else { Averages::OfLengths };
        let sample = Lengths::observed(lengths.clone()).unwrap();
        let demand = Demand { lengths: &sample, output_tokens: output, averages };
        let found = search::best(&deployment, demand);
        let mut best: f64 = 0.0;
        for prefill in 0..deployment.local_nodes {
            let split = Split { prefill, decode: deployment.local_nodes - prefill };
            // Every threshold, not only those that the search tries.
            for t in 0..=61 {
                best = best.max(throughput(&deployment, &lengths, output, averages, t, split));
            }
        }
        let ours = found.stages.throughput;
        prop_assert!((ours - best).abs() <= 1e-9 * best, "{ours} against {best}");
        let again = throughput(&deployment, &lengths, output, averages, found.threshold, found.split);
        prop_assert!((ours - again).abs() <= 1e-9 * best);
    }

    #[test]
    fn throughput_is_never_above_a_stages_bound(
        deployment in deployment(),
        lengths in prop::collection::vec(1u32..150_000, 1..100),
        output in 1.0f64..3000.0,
        threshold in 0u32..150_000,
        prefill in 0u32..6,
    ) {
        let prefill = prefill.min(deployment.local_nodes - 1);
        let split = Split { prefill, decode: deployment.local_nodes - prefill };
        let sample = Lengths::observed(lengths).unwrap();
        let work = Costs::new(&deployment, &sample, Averages::OfWork).at(threshold);
        let stages = stages(&deployment, output, &work, split);
        let (long, all) = (work.cut.share_long, stages.throughput);
        let slack = 1.0 + 1e-12;
        prop_assert!(all * long <= stages.prfaas_prefill * slack);
        prop_assert!(all * long <= stages.link * slack);
        prop_assert!(all * (1.0 - long) <= stages.local_prefill * slack);
        prop_assert!(all <= stages.decode * slack);
        prop_assert!(stages.egress_bits_per_second <= deployment.link_bits_per_second * slack);
    }

    #[test]
    fn more_of_anything_never_serves_less(
        deployment in deployment(),
        lengths in prop::collection::vec(1u32..150_000, 1..60),
    ) {
        let sample = Lengths::observed(lengths).unwrap();
        let best = |deployment: &Deployment| {
            let demand = Demand { lengths: &sample, output_tokens: 100.0, averages: Averages::OfWork };
            search::best(deployment, demand).stages.throughput
        };
        let now = best(&deployment) * (1.0 - 1e-12);
        let more = |change: &dyn Fn(&mut Deployment)| {
            let mut more = deployment.clone();
            change(&mut more);
            best(&more)
        };
        prop_assert!(more(&|d| d.prfaas_nodes += 1) >= now);
        prop_assert!(more(&|d| d.local_nodes += 1) >= now);
        prop_assert!(more(&|d| d.link_bits_per_second *= 2.0) >= now);
    }
}

/// A trace in which prompts share prefixes: sessions that grow, and a system prompt that all have.
fn sessions(requests: &[(u64, u32, u32, u64)]) -> Trace {
    let mut trace = Trace::new(512);
    for (gap, blocks, output, session) in requests {
        let ids: Vec<u64> = (0..u64::from(*blocks))
            .map(|i| if i < 2 { i } else { session * 1_000_000 + i })
            .collect();
        let at = Duration::from_millis(*gap);
        trace.push(at, blocks * 512 - 100, *output, &ids);
    }
    trace.sort();
    trace
}

fn setup(deployment: Deployment, threshold: u32, prefill: u32) -> Setup {
    let prefill = prefill.clamp(1, deployment.local_nodes - 1);
    let split = Split {
        prefill,
        decode: deployment.local_nodes - prefill,
    };
    Setup::new(deployment, threshold, split)
}

/// Replays, and counts independently from the reports for each request.
fn counted(trace: &Trace, setup: &Setup) -> (Outcome, Vec<Served>) {
    let mut all = Vec::new();
    let outcome = run(trace, setup, &mut |served| all.push(*served)).unwrap();
    (outcome, all)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn requests_tokens_and_bytes_are_conserved_and_no_stage_outdoes_itself(
        deployment in deployment(),
        requests in prop::collection::vec((0u64..60_000, 1u32..120, 1u32..600, 0u64..5), 1..150),
        threshold in 0u32..40_000,
        prefill in 1u32..5,
        pieces in 1u32..10,
        scheduled: bool,
        saturated: bool,
        loss in 0.0f64..0.2,
        cache in prop::option::of(1usize..300),
    ) {
        let trace = sessions(&requests);
        let mut setup = setup(deployment, threshold, prefill);
        setup.link = LinkOptions { pieces, loss, ..LinkOptions::default() };
        setup.cache_blocks = cache;
        if !scheduled {
            setup.policy = Policy::Fixed { link: LinkState::Ample };
        }
        if saturated {
            setup.arrivals = Arrivals::Saturated { in_flight: 20 };
        }
        let (outcome, served) = counted(&trace, &setup);

        // Each request once, in order of time, from the prompt to the last token.
        let mut seen = vec![false; requests.len()];
        for one in &served {
            prop_assert!(!std::mem::replace(&mut seen[one.index], true), "served twice");
            let request = &trace.requests()[one.index];
            let step = setup.deployment.local.decode().step_seconds;
            let decoding = (one.done - one.first_token).as_secs_f64();
            let expected = step * f64::from(request.output - 1);
            prop_assert!((decoding - expected).abs() < 1e-6);
            let profile = match one.decision.site {
                Site::Local => &setup.deployment.local,
                Site::Prfaas => &setup.deployment.prfaas,
            };
            let least = profile.seconds(f64::from(one.decision.prefill)) + step;
            prop_assert!((one.first_token - one.arrived).as_secs_f64() >= least - 1e-6);
        }
        prop_assert!(seen.iter().all(|seen| *seen));
        prop_assert_eq!(outcome.requests, requests.len());

        // Tokens: cached, copied or prefilled.
        let prompts: u64 = trace.requests().iter().map(|r| u64::from(r.tokens)).sum();
        let prefilled: u64 = served.iter().map(|s| u64::from(s.decision.prefill)).sum();
        prop_assert_eq!(outcome.prompt_tokens, prompts);
        prop_assert_eq!(outcome.prefilled_tokens, prefilled);
        prop_assert_eq!(outcome.cached_tokens, prompts - prefilled);

        // Bytes: the link has sent exactly the bytes of every sent cache and copied prefix when the last answer ends.
        let bytes = |tokens: u32| setup.deployment.prfaas.bytes(f64::from(tokens)) as u64;
        let of = |site: Site| served.iter().filter(move |s| s.decision.site == site);
        let shipped: u64 = of(Site::Prfaas).map(|s| bytes(s.decision.ship)).sum();
        let copies = |site| of(site).filter(|s| s.decision.copy > 0).map(|s| bytes(s.decision.copy)).sum();
        let (home, out): (u64, u64) = (copies(Site::Local), copies(Site::Prfaas));
        prop_assert_eq!(outcome.shipped_bytes, shipped);
        prop_assert_eq!((outcome.copied_home_bytes, outcome.copied_out_bytes), (home, out));
        let left = outcome.egress_bits_per_second / 8.0 * outcome.seconds;
        prop_assert!((left - (shipped + home) as f64).abs() <= 1e-6 * left.max(1.0));
        prop_assert_eq!(outcome.offloaded, of(Site::Prfaas).count());

        // No stage works more than its capacity, by independent sums.
        let span = outcome.seconds;
        let worked = |site: Site, profile: &Profile| -> f64 {
            of(site).map(|s| profile.seconds(f64::from(s.decision.prefill))).sum()
        };
        let deployment = &setup.deployment;
        let slack = span * (1.0 + 1e-9) + 1e-6;
        prop_assert!(worked(Site::Prfaas, &deployment.prfaas) <= f64::from(deployment.prfaas_nodes) * slack);
        let goodput = setup.link.goodput(deployment.link_bits_per_second);
        prop_assert!((shipped + home) as f64 <= goodput * slack + 1.0);
        if outcome.conversions.is_empty() {
            prop_assert!(worked(Site::Local, &deployment.local) <= f64::from(setup.split.prefill) * slack);
            let decode = deployment.local.decode();
            let steps: u64 = trace.requests().iter().map(|r| u64::from(r.output)).sum();
            let slots = f64::from(setup.split.decode * decode.slots);
            prop_assert!(steps as f64 * decode.step_seconds <= slots * slack);
        }
        for used in [outcome.used.prfaas, outcome.used.link, outcome.used.local_prefill, outcome.used.decode] {
            prop_assert!((0.0..=1.0 + 1e-6).contains(&used), "{:?}", outcome.used);
        }

        // A second replay has the same results.
        let (again, told) = counted(&trace, &setup);
        prop_assert_eq!(again, outcome);
        prop_assert_eq!(told, served);
    }
}

#[test]
fn a_lone_request_takes_what_its_parts_take() {
    let deployment = Deployment {
        prfaas: Profile::open("1t-h200").unwrap(),
        prfaas_nodes: 1,
        local: Profile::open("1t-h20").unwrap(),
        local_nodes: 2,
        link_bits_per_second: 10e9,
    };
    let mut trace = Trace::new(512);
    trace.push(Duration::ZERO, 32_000, 10, &[]);
    let mut setup = setup(deployment, 10_000, 1);
    setup.link = LinkOptions {
        latency: Duration::from_millis(50),
        pieces: 4,
        ..LinkOptions::default()
    };
    let (_, served) = counted(&trace, &setup);
    // The last quarter of 735 MB at 10 Gbit/s takes 0.147 s, and the pieces before it have been sent by then.
    let expected = 1.84 + 735_366_349.0 * 8.0 / 4.0 / 10e9 + 0.05 + 0.025;
    assert!((served[0].first_token.as_secs_f64() - expected).abs() < 1e-3);
    // Locally it is the prefill and a step.
    setup.threshold = 40_000;
    let (_, served) = counted(&trace, &setup);
    assert!((served[0].first_token.as_secs_f64() - 4.969 - 0.025).abs() < 1e-6);
}

#[test]
fn a_setup_that_cannot_serve_is_refused() {
    let deployment = Deployment {
        prfaas: Profile::open("1t-h200").unwrap(),
        prfaas_nodes: 1,
        local: Profile::open("1t-h20").unwrap(),
        local_nodes: 3,
        link_bits_per_second: 10e9,
    };
    let mut trace = Trace::new(512);
    trace.push(Duration::ZERO, 100, 10, &[]);
    let good = setup(deployment, 1000, 1);
    let refused = |change: &dyn Fn(&mut Setup)| {
        let mut setup = good.clone();
        change(&mut setup);
        run(&trace, &setup, &mut |_| {}).unwrap_err().to_string()
    };
    assert!(refused(&|s| s.split.decode = 9).contains("expected 3 together"));
    assert!(
        refused(&|s| s.split = Split {
            prefill: 0,
            decode: 3
        })
        .contains("there is no local prefill node")
    );
    assert!(refused(&|s| s.deployment.prfaas_nodes = 0).contains("there is no PrfaaS node"));
    assert!(refused(&|s| s.link.loss = 1.0).contains("loss"));
    assert!(refused(&|s| s.arrivals = Arrivals::Saturated { in_flight: 0 }).contains("in flight"));
    let still = LinkChange {
        at: Duration::ZERO,
        factor: 0.0,
    };
    assert!(refused(&|s| s.changes = vec![still]).contains("never runs again"));
    let nobody = run(&Trace::new(512), &good, &mut |_| {}).unwrap_err();
    assert!(nobody.to_string().contains("no requests"));
    let options = scheduler::Options::default();
    assert!(options.ample_below < options.scarce_above);
}
