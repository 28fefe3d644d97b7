//! NVIDIA's conformance kit for engines behind Dynamo, with the real engine, the demo model and the CPU backend, in every role.

use std::net::{IpAddr, Ipv4Addr};

use clap::Parser;
use dynamo_backend_common::testing::run_conformance;
use kimi_linear_cluster::wire::Role;
use kimi_linear_cluster::worker::{Options, Shared, WorkerEngine};

const FLAGS: [&str; 7] = [
    "kimi-linear-worker",
    "--backend",
    "cpu",
    "--max-num-seqs",
    "8",
    "--max-model-len",
    "4096",
];

/// An engine with a model of its own.
fn engine(role: Role) -> WorkerEngine {
    let options = Options::parse_from(FLAGS);
    let shared = Shared::new(options, IpAddr::V4(Ipv4Addr::LOCALHOST));
    WorkerEngine::new(shared.expect("the flags are valid"), role)
}

async fn conforms(role: Role) {
    if let Err(failure) = run_conformance(|| engine(role)).await {
        panic!("{role}: {failure}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_for_whole_answers_conforms() {
    conforms(Role::Both).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefill_worker_conforms() {
    conforms(Role::Prefill).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decode_worker_conforms() {
    conforms(Role::Decode).await;
}
