//! Two workers that drop parameters together under a burst: answers are those of a single server, whatever happens to one of them.

use std::sync::Arc;
use std::time::Duration;

use kimi_linear::backend::{Parallelism, host_memory};
use kimi_linear::config::Dtype;
use kimi_linear::data_parallel::{ParameterDrop, state_sizes};
use kimi_linear::engine::{MemoryPlanner, PREFILL_CHUNK};
use kimi_linear::llm::LlmFiles;
use kimi_linear_cluster::demo::processes::{Cluster, ClusterOptions, Process, Role, Site};

use super::harness::{
    self, CONTEXT, Known, PATIENCE, Single, assert_empties, clients, join, limited, metric, start,
};

/// Requests at the same time: more than both workers have slots for.
const CLIENTS: usize = 24;

/// The demo model's routed experts are so small that a copy of them is no room for another sequence.
const FORM: ParameterDrop = ParameterDrop::Layers;

/// Slots of a worker with all parameters.
const SLOTS: usize = 5;

const LEADER: Process = Process::Worker(Role::Both, 0);
const FOLLOWER: Process = Process::Worker(Role::Both, 1);

/// The fraction of the host's memory with which a worker that has all parameters has few slots.
fn utilization() -> f64 {
    let files = LlmFiles::demo().unwrap();
    let checkpoint = files.checkpoint().unwrap();
    let layers = checkpoint.layer_bytes(&files.config);
    let sizes = |memory| {
        let planner = MemoryPlanner {
            sequences: 8,
            context: Some(CONTEXT),
            prefill_chunk: PREFILL_CHUNK,
            checkpoints: 8,
            blocks: None,
            speculative: 0,
            memory: Some(memory),
            weights: checkpoint.total_bytes(),
            degrees: Parallelism::SINGLE,
            cache: Dtype::F32,
        };
        state_sizes(&files.config, &layers, &planner, FORM, 2)
    };
    let (mut low, mut high) = (0, 1 << 32);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        match sizes(middle).is_ok_and(|sizes| sizes.whole.slots >= SLOTS) {
            true => high = middle,
            false => low = middle,
        }
    }
    // Not the very least: the fraction is rounded.
    let memory = high + 4096;
    println!("{memory} bytes: {:?}", sizes(memory).unwrap());
    memory as f64 / host_memory().unwrap() as f64
}

fn options(name: &str) -> ClusterOptions {
    let mut options = harness::options(name, &[(Role::Both, 2)]);
    let address = format!("{}:8900", options.network.address(Site::Local));
    let flags = |side: &str| -> Vec<String> {
        [
            "--parameter-drop".to_owned(),
            FORM.name().to_owned(),
            side.to_owned(),
            address.clone(),
            "--gpu-memory-utilization".to_owned(),
            utilization().to_string(),
            "--swap-space".to_owned(),
            "0.1".to_owned(),
        ]
        .into()
    };
    let each = [
        (LEADER, flags("--parameter-listen")),
        (FOLLOWER, flags("--parameter-peer")),
    ];
    options.arguments_of = each.into();
    options
}

/// The same requests, of which only the tokens are compared.
fn without_salt(known: &Known) -> Known {
    let mut bodies = known.bodies.clone();
    for body in &mut bodies {
        body.as_object_mut().unwrap().remove("cache_salt");
    }
    Known {
        bodies,
        expected: known.expected.clone(),
    }
}

async fn is(cluster: &Cluster, worker: Process, state: &str) -> bool {
    let label = format!("state=\"{state}\"");
    metric(cluster, worker, "kimi_linear:parameter_state", &[&label]).await == 1.0
}

async fn is_paired(cluster: &Cluster, worker: Process) -> bool {
    metric(cluster, worker, "kimi_linear:parameter_peer_connected", &[]).await == 1.0
}

/// Waits until this holds.
macro_rules! wait {
    ($what:expr, $holds:expr) => {
        let since = std::time::Instant::now();
        while !$holds {
            assert!(since.elapsed() < PATIENCE, "{}", $what);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
}

async fn wait_paired(cluster: &Cluster) {
    wait!(
        "the workers pair",
        is_paired(cluster, LEADER).await && is_paired(cluster, FOLLOWER).await
    );
}

async fn wait_whole(cluster: &Cluster) {
    wait!(
        "both have all parameters",
        is(cluster, LEADER, "whole").await && is(cluster, FOLLOWER, "whole").await
    );
}

async fn wait_dropped(cluster: &Cluster) {
    wait!(
        "both drop parameters",
        is(cluster, LEADER, "dropped").await && is(cluster, FOLLOWER, "dropped").await
    );
}

/// A burst has both drop, and its end has them restore; each of them is killed while they are dropped, and started again.
async fn pair(name: &str, victim: Process) {
    let mut cluster = start(options(name)).await;
    let single = Single::start().await;
    let known = Arc::new(Known::new(&single, 24, 40).await);
    wait_paired(&cluster).await;
    wait_whole(&cluster).await;
    let memory = "kimi_linear:device_memory_bytes";
    let weights = ["use=\"weights\""];
    let before = metric(&cluster, LEADER, memory, &weights).await;
    let (seen, tasks) = clients(&cluster.frontend_url(), CLIENTS, &known);
    wait_dropped(&cluster).await;
    assert!(metric(&cluster, LEADER, memory, &weights).await < before);
    seen.more(CLIENTS).await;
    join(&seen, tasks).await;
    assert_eq!(seen.failed(), [], "a request was lost");
    wait_whole(&cluster).await;
    assert_eq!(metric(&cluster, LEADER, memory, &weights).await, before);
    // Those that are computed again are cut elsewhere: they have the same tokens, and not the same bits.
    let known = Arc::new(without_salt(&known));
    let (seen, tasks) = clients(&cluster.frontend_url(), CLIENTS, &known);
    wait_dropped(&cluster).await;
    cluster.kill(victim).await.unwrap();
    let other = match victim {
        LEADER => FOLLOWER,
        _ => LEADER,
    };
    wait!("the other one is whole", is(&cluster, other, "whole").await);
    assert!(!is_paired(&cluster, other).await);
    seen.more(12).await;
    cluster.restart(victim).await.unwrap();
    wait_paired(&cluster).await;
    seen.more(12).await;
    join(&seen, tasks).await;
    seen.print_failed();
    assert_eq!(seen.failed(), [], "another worker was there");
    wait_whole(&cluster).await;
    assert_eq!(metric(&cluster, LEADER, memory, &weights).await, before);
    let lost = "kimi_linear:replicas_lost_total";
    assert_eq!(metric(&cluster, other, lost, &[]).await, 1.0);
    println!("{victim} killed: {} right", seen.right());
    assert_empties(&cluster, 150).await;
    cluster.check().unwrap();
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_worker_that_follows_is_killed() {
    limited(600, pair("pair-follower", FOLLOWER)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_worker_that_leads_is_killed() {
    limited(600, pair("pair-leader", LEADER)).await;
}
