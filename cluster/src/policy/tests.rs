//! Decisions, without Dynamo.

use super::members::{Member, MemberKey, Reach};
use super::planner::Expected;
use super::*;
use crate::wire::{self, Registration};
use kimi_linear_plan::profile::Profile;
use kimi_linear_plan::scheduler::Options;

/// The paper's case study.
pub(super) fn planner() -> Planner {
    Planner {
        prfaas: Profile::open("1t-h200").unwrap(),
        local: Profile::open("1t-h20").unwrap(),
        link_bits_per_second: 100e9,
        expected: Expected::parse("lognormal:9.90,1.00,128,128000", None).unwrap(),
        options: Options::default(),
    }
}

fn join(members: &Members, id: u64, cluster: &str, role: wire::Role) {
    let registration = Registration {
        cluster: cluster.to_owned(),
        role,
        control: None,
        prefill_seconds_per_token: None,
        decode_seconds_per_token: None,
    };
    let key = MemberKey {
        endpoint: format!("n/{role}/generate"),
        id,
    };
    members.put(
        key.clone(),
        Member::new("m".to_owned(), role, Some(registration)),
    );
    members.set_reach(&key, Reach::Reachable);
}

fn policy(setting: Threshold) -> Policy {
    let members = Arc::new(Members::default());
    for id in 1..=3 {
        join(&members, id, "local", wire::Role::Prefill);
    }
    for id in 11..=14 {
        join(&members, id, "prfaas", wire::Role::Prefill);
    }
    for id in 21..=25 {
        join(&members, id, "local", wire::Role::Decode);
    }
    Policy::new(members, planner(), setting)
}

fn worker(worker: u64, site: Site) -> Candidate {
    Candidate {
        worker,
        site,
        cached: 0,
        load: 0,
        seconds_per_token: None,
    }
}

fn both() -> Vec<Candidate> {
    vec![worker(1, Site::Local), worker(11, Site::Prfaas)]
}

/// The cluster that a prompt goes to.
fn site(policy: &Policy, total: u32, candidates: &[Candidate]) -> Site {
    let chosen = policy.choose(total, candidates).unwrap();
    candidates[chosen].site
}

#[test]
fn long_prompts_go_to_the_prfaas_cluster_and_others_stay() {
    let policy = policy(Threshold::Fixed(400));
    assert_eq!(site(&policy, 400, &both()), Site::Local);
    assert_eq!(site(&policy, 401, &both()), Site::Prfaas);
    let (last, decided) = policy.after(0);
    assert_eq!(last, 2);
    assert_eq!(decided[1].worker, "11");
    assert_eq!(
        (decided[1].uncached, decided[1].threshold),
        (401, Some(400))
    );
    assert!(!decided[1].fallback);
}

#[test]
fn the_threshold_can_be_moved_from_0_to_infinity_while_it_runs() {
    let policy = policy(Threshold::Fixed(0));
    assert_eq!(site(&policy, 1, &both()), Site::Prfaas);
    for (tokens, expected) in [
        (100, Site::Prfaas),
        (99_999, Site::Prfaas),
        (100_000, Site::Local),
    ] {
        policy.set_threshold(Threshold::Fixed(tokens));
        assert_eq!(site(&policy, 100_000, &both()), expected);
    }
    policy.set_threshold(Threshold::Never);
    assert_eq!(site(&policy, u32::MAX, &both()), Site::Local);
    assert_eq!(policy.snapshot().threshold, None);
    // Not even for a prefix that only the other cluster has.
    let mut cached = both();
    cached[1].cached = 90_000;
    assert_eq!(site(&policy, 100_000, &cached), Site::Local);
}

#[test]
fn auto_is_the_plan_for_the_workers_that_are_there() {
    let policy = policy(Threshold::Auto);
    // Nothing was planned yet.
    assert_eq!(site(&policy, 100_000, &both()), Site::Local);
    policy.tick(Instant::now(), &Told::default(), &[]);
    let threshold = policy.snapshot().threshold.unwrap();
    assert!((17_000..=21_000).contains(&threshold), "{threshold}");
    assert_eq!(site(&policy, threshold, &both()), Site::Local);
    assert_eq!(site(&policy, threshold + 1, &both()), Site::Prfaas);
}

#[test]
fn a_cluster_without_a_worker_is_replaced_by_the_other() {
    let policy = policy(Threshold::Fixed(400));
    assert_eq!(site(&policy, 10, &both()[1..]), Site::Prfaas);
    assert_eq!(site(&policy, 10_000, &both()[..1]), Site::Local);
    assert_eq!(policy.choose(10, &[]), None);
    let (_, decided) = policy.after(0);
    assert_eq!(decided.len(), 2);
    for decision in &decided {
        assert!(decision.fallback);
        assert_eq!(decision.reason, Reason::OnlyCluster);
    }
    assert_eq!(policy.snapshot().sums.fallbacks, 2);
}

#[test]
fn prefixes_on_either_side_are_counted() {
    let policy = policy(Threshold::Fixed(4000));
    policy.tick(Instant::now(), &Told::default(), &[]);
    // Locally cached tokens are not computed again: the prompt is short.
    let mut cached = both();
    cached[0].cached = 6000;
    assert_eq!(site(&policy, 10_000, &cached), Site::Local);
    cached[0].cached = 5999;
    assert_eq!(site(&policy, 10_000, &cached), Site::Prfaas);
    // With the PrfaaS cluster's prefix it would be short, and the local cluster would have to compute it.
    let mut cached = both();
    cached[1].cached = 8000;
    assert_eq!(site(&policy, 10_000, &cached), Site::Prfaas);
    let (last, decided) = policy.after(2);
    assert_eq!(last, 3);
    assert_eq!(
        (decided[0].cached_local, decided[0].cached_prfaas),
        (0, 8000)
    );
    assert_eq!(
        (decided[0].uncached, decided[0].reason),
        (2000, Reason::Prefix)
    );
    // The longest prefix of a cluster counts, whichever worker has it.
    let mut several = both();
    several.push(worker(2, Site::Local));
    several[2].cached = 7000;
    let chosen = policy.choose(10_000, &several).unwrap();
    assert_eq!(several[chosen].worker, 2);
}

#[test]
fn within_a_cluster_the_worker_that_is_done_first_is_taken() {
    let policy = policy(Threshold::Never);
    let mut workers: Vec<_> = (1..=3).map(|id| worker(id, Site::Local)).collect();
    workers[0].load = 500;
    workers[1].load = 100;
    workers[2].load = 300;
    assert_eq!(policy.choose(1000, &workers), Some(1));
    // A prefix counts as work that need not be done.
    workers[0].cached = 900;
    assert_eq!(policy.choose(1000, &workers), Some(0));
    // Equal work: the one with the prefix.
    workers[0].load = 1000;
    assert_eq!(policy.choose(1000, &workers), Some(0));
    // Equal in all: each in its turn.
    let idle: Vec<_> = (1..=3).map(|id| worker(id, Site::Local)).collect();
    let mut taken: Vec<_> = (0..3).filter_map(|_| policy.choose(10, &idle)).collect();
    taken.sort_unstable();
    assert_eq!(taken, [0, 1, 2]);
}

#[test]
fn queues_are_estimated_and_run_down() {
    let policy = policy(Threshold::Fixed(400));
    let mut workers = both();
    workers[1].seconds_per_token = Some(0.01);
    workers[1].load = 500;
    policy.choose(1000, &workers);
    let queue = policy.snapshot().queues[&11];
    assert_eq!(queue.tokens, 1500);
    assert!((14.0..=15.0).contains(&queue.seconds), "{}", queue.seconds);
    let now = Instant::now();
    let seconds = |after| -> f64 {
        let queued = policy.queued(now + Duration::from_secs(after));
        let prfaas = queued.iter().filter(|it| it.0 == Site::Prfaas);
        prfaas.map(|it| it.1).sum()
    };
    assert!((9.0..=10.0).contains(&seconds(5)));
    assert!(seconds(20) < 1e-9);
    // A worker that has gone has no queue.
    let key = MemberKey {
        endpoint: "n/prefill/generate".to_owned(),
        id: 11,
    };
    policy.members().remove(&key);
    assert!(seconds(0) < 1e-9);
    assert!(!policy.snapshot().queues.contains_key(&11));
}

#[test]
fn a_backlog_at_one_cluster_moves_the_threshold() {
    let policy = policy(Threshold::Auto);
    let start = Instant::now();
    policy.tick(start, &Told::default(), &[]);
    let planned = policy.snapshot().threshold.unwrap();
    for number in 0..300u32 {
        policy.choose(1000 + 200 * number, &both());
    }
    let told = Told {
        prfaas_queue_seconds: Some(600.0),
        local_queue_seconds: Some(0.0),
        ..Told::default()
    };
    policy.tick(start + Duration::from_secs(30), &told, &[64]);
    let moved = policy.snapshot().threshold;
    assert!(
        moved.is_none_or(|tokens| tokens > planned),
        "{planned} {moved:?}"
    );
    // A threshold that is set does not move.
    policy.set_threshold(Threshold::Fixed(7));
    policy.tick(start + Duration::from_secs(60), &told, &[]);
    assert_eq!(policy.snapshot().threshold, Some(7));
}
