//! Tests of the scheduler with given counters, a minute at a time.

use super::*;
use crate::lengths::LogNormal;
use crate::profile::Profile;
use crate::route::LinkState;

fn deployment(link: f64) -> Deployment {
    Deployment {
        prfaas: Profile::open("1t-h200").unwrap(),
        prfaas_nodes: 4,
        local: Profile::open("1t-h20").unwrap(),
        local_nodes: 8,
        link_bits_per_second: link,
    }
}

fn scheduler(split: Split, link: f64) -> Scheduler {
    Scheduler::new(deployment(link), 19_000, split, 1024.0, Options::default())
}

const FOUND: Split = Split {
    prefill: 3,
    decode: 5,
};

/// Passes it `seconds` of the case study's prompts at `rate`, from `start`, with the same counters every second.
fn feed(
    scheduler: &mut Scheduler,
    start: u64,
    seconds: u64,
    rate: u64,
    told: impl Fn(u64) -> Telemetry,
) -> Vec<(Role, Role)> {
    let lengths = LogNormal::case_study().lengths().unwrap();
    let sorted = lengths.sorted();
    let mut conversions = Vec::new();
    for second in start..start + seconds {
        let now = Duration::from_secs(second);
        for i in 0..rate {
            // A step that is coprime to their number visits all of them.
            let at = ((second * rate + i) * 1_597) as usize % sorted.len();
            scheduler.route(now, sorted[at], Cached::default());
        }
        conversions.extend(scheduler.observe(now, &told(second)));
    }
    conversions
}

#[test]
fn a_good_threshold_stays_where_it_is() {
    let mut scheduler = scheduler(FOUND, 100e9);
    let idle = |second| Telemetry {
        sent_bytes: second * 1_500_000_000,
        ..Telemetry::default()
    };
    let conversions = feed(&mut scheduler, 1, 3000, 3, idle);
    assert_eq!(scheduler.threshold(), 19_000);
    assert!(conversions.is_empty());
    assert_eq!(scheduler.link().state, LinkState::Ample);
}

#[test]
fn a_queue_at_one_stage_sends_requests_to_the_other() {
    let moved = |told: Telemetry| {
        let mut scheduler = scheduler(FOUND, 100e9);
        feed(&mut scheduler, 1, 120, 3, |_| told);
        scheduler.threshold()
    };
    let at_prfaas = moved(Telemetry {
        prfaas_queue_seconds: 200.0,
        ..Telemetry::default()
    });
    let at_local = moved(Telemetry {
        local_queue_seconds: 200.0,
        ..Telemetry::default()
    });
    assert!(at_prfaas > 25_000, "{at_prfaas}");
    assert!(at_local < 15_000, "{at_local}");
}

#[test]
fn a_link_that_falls_to_a_trickle_keeps_prompts_at_home() {
    let mut scheduler = scheduler(FOUND, 20e9);
    let choked = |second| Telemetry {
        sent_bytes: second * 250_000_000,
        queued_bytes: 20_000_000_000,
        ..Telemetry::default()
    };
    feed(&mut scheduler, 1, 240, 2, choked);
    assert!((scheduler.link().bits_per_second / 2e9 - 1.0).abs() < 0.01);
    assert_eq!(scheduler.link().state, LinkState::Scarce);
    assert!(scheduler.threshold() > 50_000, "{}", scheduler.threshold());
}

#[test]
fn a_lopsided_cluster_is_turned_one_node_at_a_time_and_stops() {
    let lopsided = Split {
        prefill: 1,
        decode: 7,
    };
    let mut scheduler = scheduler(lopsided, 100e9);
    let mut conversions = 0;
    for minute in 0..120 {
        let asked = feed(&mut scheduler, 60 * minute + 1, 60, 3, |_| {
            Telemetry::default()
        });
        for (from, to) in asked {
            assert_eq!((from, to), (Role::Decode, Role::Prefill));
            let split = scheduler.split();
            assert_eq!(split.prefill + split.decode, 7, "one is neither");
            scheduler.converted(Duration::from_secs(60 * (minute + 1)), to);
            conversions += 1;
        }
    }
    assert_eq!(conversions, 2);
    assert_eq!(scheduler.split(), FOUND);
}

#[test]
fn an_idle_cluster_is_left_alone() {
    let lopsided = Split {
        prefill: 1,
        decode: 7,
    };
    let mut scheduler = scheduler(lopsided, 100e9);
    // Less than half of its capacity: one request every three seconds.
    let lengths = LogNormal::case_study().lengths().unwrap();
    for second in 1..6000u64 {
        let now = Duration::from_secs(second);
        if second % 3 == 0 {
            let at = (second * 1_597) as usize % lengths.count();
            scheduler.route(now, lengths.sorted()[at], Cached::default());
        }
        assert_eq!(scheduler.observe(now, &Telemetry::default()), None);
    }
}
