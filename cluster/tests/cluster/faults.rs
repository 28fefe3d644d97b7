//! Each kind of process is killed while requests run, and started again. A request is answered as by a single server, or fails with a
//! sentence where nothing can take it over; none hangs; afterwards all are answered again.

use std::sync::Arc;
use std::time::Duration;

use kimi_linear_cluster::demo::processes::{Discovery, Process, Role, Threshold};

use super::harness::{
    self, COMPLETIONS, Known, Single, assert_empties, clients, join, limited, start, until,
};

/// Requests at the same time.
const CLIENTS: usize = 6;

/// etcd forgets a process that has not been heard of for so long.
const LEASE: Duration = Duration::from_secs(30);

/// Kills a process under load and starts it again. Where another one can take its requests over, none may fail.
async fn killed(name: &str, victim: Process, workers: &[(Role, usize)]) {
    let mut options = harness::options(name, workers);
    // Both clusters prefill, and each can do it for the other.
    options.threshold = Threshold::Fixed(200);
    let mut cluster = start(options).await;
    let single = Single::start().await;
    let known = Arc::new(Known::new(&single, 24, 24).await);
    let (seen, tasks) = clients(&cluster.frontend_url(), CLIENTS, &known);
    seen.more(12).await;
    cluster.kill(victim).await.unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    cluster.restart(victim).await.unwrap();
    seen.more(12).await;
    join(&seen, tasks).await;
    println!("{victim} killed: {} right", seen.right());
    seen.print_failed();
    if victim != Process::Frontend {
        assert_eq!(seen.failed(), [], "another worker was there");
    }
    // Discovery forgets the killed process after a while; from then on nothing fails.
    let count = cluster.workers().len();
    until(
        &cluster,
        60,
        "every worker is there, and no other",
        |state| {
            let reachable = |worker: &&_| is_reachable(worker);
            state.workers.len() == count && state.workers.iter().filter(reachable).count() == count
        },
    )
    .await;
    all_right(&cluster, &known).await;
    assert_empties(&cluster, 150).await;
    cluster.check().unwrap();
    cluster.shutdown().await;
}

fn is_reachable(worker: &kimi_linear_cluster::demo::status::WorkerState) -> bool {
    worker.reach == "reachable"
}

async fn all_right(cluster: &kimi_linear_cluster::demo::processes::Cluster, known: &Known) {
    let client = harness::client(&cluster.frontend_url());
    for (index, body) in known.bodies.iter().enumerate() {
        let answer = client.post(COMPLETIONS, body).await;
        let answer = answer.unwrap_or_else(|error| panic!("afterwards: {error}"));
        known.assert_right(index, &answer);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_prefill_worker() {
    let victim = Process::worker(Role::Prefill, 0);
    let workers = [(Role::Prefill, 1), (Role::Decode, 1), (Role::Prfaas, 1)];
    limited(400, killed("killed-prefill", victim, &workers)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_prfaas_worker() {
    let victim = Process::worker(Role::Prfaas, 0);
    let workers = [(Role::Prefill, 1), (Role::Decode, 1), (Role::Prfaas, 1)];
    limited(400, killed("killed-prfaas", victim, &workers)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_decode_worker() {
    let victim = Process::worker(Role::Decode, 1);
    let workers = [(Role::Prefill, 1), (Role::Decode, 2), (Role::Prfaas, 1)];
    limited(400, killed("killed-decode", victim, &workers)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_frontend() {
    let workers = [(Role::Prefill, 1), (Role::Decode, 1), (Role::Prfaas, 1)];
    limited(400, killed("killed-frontend", Process::Frontend, &workers)).await;
}

/// etcd is killed: requests go on. It comes back: processes are found again.
async fn killed_etcd() {
    let workers = [(Role::Prefill, 1), (Role::Decode, 1), (Role::Prfaas, 1)];
    let mut options = harness::options("killed-etcd", &workers);
    options.discovery = Discovery::Etcd;
    let lease = LEASE.as_secs().to_string();
    options.environment = vec![("ETCD_LEASE_TTL".into(), lease)];
    let mut cluster = start(options).await;
    let single = Single::start().await;
    let known = Arc::new(Known::new(&single, 24, 24).await);
    let (seen, tasks) = clients(&cluster.frontend_url(), CLIENTS, &known);
    seen.more(6).await;
    cluster.kill(Process::Etcd).await.unwrap();
    seen.more(12).await;
    println!("without etcd: {} right", seen.right());
    cluster.restart(Process::Etcd).await.unwrap();
    seen.more(6).await;
    join(&seen, tasks).await;
    assert_eq!(seen.failed(), [], "a request failed that needs no etcd");
    // A process that could not renew its lease would end by itself.
    tokio::time::sleep(LEASE + Duration::from_secs(5)).await;
    cluster.check().unwrap();
    // A worker that starts now is found; the killed one is forgotten when its lease ends.
    let victim = Process::worker(Role::Prefill, 0);
    cluster.kill(victim).await.unwrap();
    cluster.restart(victim).await.unwrap();
    until(
        &cluster,
        120,
        "every worker is there, and no other",
        |state| state.workers.len() == 3 && state.workers.iter().all(is_reachable),
    )
    .await;
    all_right(&cluster, &known).await;
    cluster.check().unwrap();
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_etcd() {
    let version = std::process::Command::new("etcd").arg("--version").output();
    if version.is_err() {
        println!("skipped: etcd is not installed (Debian's etcd-server)");
        return;
    }
    limited(400, killed_etcd()).await;
}
