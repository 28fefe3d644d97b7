//! Two hundred requests of every kind through two clusters and through a single server: the same answers, token for token.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kimi_linear_cluster::demo::load::Client;
use kimi_linear_cluster::demo::processes::{Process, Role, Threshold};
use rand::SeedableRng as _;
use rand_chacha::ChaCha8Rng;

use super::drawn::{self, Drawn};
use super::harness::{self, EACH, Single, limited, metric, said, start};

const REQUESTS: usize = 200;

/// Requests at the same time.
const CLIENTS: usize = 16;

/// The variable that sets the seed.
const VARIABLE: &str = "KIMI_LINEAR_TEST_SEED";

fn seed() -> u64 {
    let seed = match std::env::var(VARIABLE) {
        Ok(seed) => seed.parse().expect("KIMI_LINEAR_TEST_SEED is a number"),
        Err(_) => rand::random(),
    };
    println!("a drawn seed: {VARIABLE}={seed} repeats it");
    seed
}

#[tokio::test(flavor = "multi_thread")]
async fn two_clusters_answer_as_a_single_server() {
    let seed = seed();
    limited(1200, async move {
        let mut options = harness::options("equal", &EACH);
        // Chats of some length are offloaded, short ones are not.
        options.threshold = Threshold::Fixed(60);
        let mut cluster = start(options).await;
        let single = Arc::new(Single::start().await);
        let client = harness::client(&cluster.frontend_url());
        let next = Arc::new(AtomicUsize::new(0));
        let tasks = (0..CLIENTS).map(|_| {
            let (client, single) = (client.clone(), Arc::clone(&single));
            let next = Arc::clone(&next);
            tokio::spawn(async move {
                loop {
                    let number = next.fetch_add(1, Ordering::SeqCst);
                    if number >= REQUESTS {
                        return;
                    }
                    one(&client, &single, seed, number).await;
                }
            })
        });
        for task in tasks.collect::<Vec<_>>() {
            task.await.unwrap();
        }
        let state = cluster.status().cluster().await.unwrap();
        let requests = state.requests;
        println!("{requests:?}");
        assert!(
            requests.local > 20 && requests.prfaas > 20,
            "both clusters prefill: {requests:?}"
        );
        let decode = Process::worker(Role::Decode, 0);
        let recomputed = "kimi_linear:kv_transfer_recomputed_total";
        assert_eq!(metric(&cluster, decode, recomputed, &[]).await, 0.0);
        harness::assert_empties(&cluster, 60).await;
        cluster.check().unwrap();
        cluster.shutdown().await;
    })
    .await;
}

async fn one(client: &Client, single: &Single, seed: u64, number: usize) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed.wrapping_add(number as u64));
    let Drawn { path, body } = drawn::request(&mut rng, number);
    let what = format!("request {number} of seed {seed}");
    let answer = client.post(path, &body).await;
    let answer = answer.unwrap_or_else(|error| panic!("{what}: {error}: {body}"));
    let expected = single.choices(path, &body).await;
    assert_eq!(said(&answer), expected, "{what}: {body}");
}
