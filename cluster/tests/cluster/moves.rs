//! What changes while requests run: a worker's role, and the threshold.

use std::sync::Arc;

use kimi_linear_cluster::demo::processes::{Process, Role};
use kimi_linear_cluster::demo::status::{ClusterState, NewThreshold};

use super::harness::{
    self, EACH, Known, Single, assert_empties, clients, join, limited, start, until,
};

/// Whether the worker with this control address is there in this role, and its answers get to the frontend.
fn has_role(state: &ClusterState, control: &str, role: &str) -> bool {
    let mut workers = state.workers.iter();
    let of = workers.find(|worker| worker.control.as_deref() == Some(control));
    of.is_some_and(|worker| worker.role == role && worker.reach == "reachable")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_changes_without_a_lost_request() {
    limited(600, async {
        let workers = [(Role::Prefill, 2), (Role::Decode, 1), (Role::Prfaas, 1)];
        let mut cluster = start(harness::options("roles", &workers)).await;
        let single = Single::start().await;
        let known = Arc::new(Known::new(&single, 24, 24).await);
        let (seen, tasks) = clients(&cluster.frontend_url(), 6, &known);
        let moved = cluster.worker_url(Process::worker(Role::Prefill, 1));
        for round in 0..2 {
            for role in ["decode", "prefill"] {
                seen.more(6).await;
                cluster.status().set_role(&moved, role).await.unwrap();
                until(&cluster, 60, role, |state| has_role(state, &moved, role)).await;
                println!("round {round}: {role}, {} right", seen.right());
            }
        }
        seen.more(6).await;
        join(&seen, tasks).await;
        assert_eq!(seen.failed(), [], "a request was lost");
        assert!(seen.right() >= 30);
        let split = cluster.status().cluster().await.unwrap().split;
        assert_eq!((split.prefill, split.decode), (2, 1));
        assert_empties(&cluster, 150).await;
        cluster.check().unwrap();
        cluster.shutdown().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_threshold_moves_from_nothing_to_everything_and_back() {
    limited(600, async {
        let mut cluster = start(harness::options("threshold", &EACH)).await;
        let single = Single::start().await;
        let known = Arc::new(Known::new(&single, 24, 16).await);
        let (seen, tasks) = clients(&cluster.frontend_url(), 6, &known);
        let before = cluster.status().cluster().await.unwrap().requests;
        for threshold in [
            NewThreshold::Tokens(0),
            NewThreshold::Tokens(300),
            NewThreshold::Named("none"),
            NewThreshold::Tokens(u32::MAX - 1),
            NewThreshold::Named("auto"),
            NewThreshold::Tokens(300),
            NewThreshold::Tokens(0),
        ] {
            cluster.status().set_threshold(threshold).await.unwrap();
            seen.more(10).await;
        }
        join(&seen, tasks).await;
        assert_eq!(seen.failed(), [], "a moved threshold is no error");
        let after = cluster.status().cluster().await.unwrap().requests;
        let (local, prfaas) = (after.local - before.local, after.prfaas - before.prfaas);
        println!("{} right: {local} local, {prfaas} prfaas", seen.right());
        assert!(local >= 10 && prfaas >= 10);
        assert_empties(&cluster, 150).await;
        cluster.check().unwrap();
        cluster.shutdown().await;
    })
    .await;
}
