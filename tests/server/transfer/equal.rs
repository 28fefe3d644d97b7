//! Five hundred requests of every kind through two servers, both loaded, and through one: the same answers, to the bit.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use kimi_linear::connector::LoadFailure;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::super::harness::Running;
use super::super::seeds;
use super::drawn::{self, Drawn};
use super::{assert_empties, bodies, consumer, producer, said, setup};

const REQUESTS: usize = 500;

/// Clients that ask at the same time.
const CLIENTS: usize = 12;

struct Servers {
    one: Running,
    prefill: Running,
    decode: Running,
    seed: u64,
    compared: AtomicUsize,
}

#[tokio::test(flavor = "multi_thread")]
async fn two_servers_answer_as_one() {
    let seed = seeds::printed(seeds::drawn());
    let servers = Arc::new(Servers {
        one: setup(None).start().await,
        prefill: setup(Some(producer())).start().await,
        // What does not come is an error: nothing is computed twice without being seen.
        decode: setup(Some(consumer(LoadFailure::Fail))).start().await,
        seed,
        compared: AtomicUsize::new(0),
    });
    let next = Arc::new(AtomicUsize::new(0));
    let clients = (0..CLIENTS).map(|_| {
        let (servers, next) = (Arc::clone(&servers), Arc::clone(&next));
        tokio::spawn(async move {
            loop {
                let number = next.fetch_add(1, Ordering::SeqCst);
                if number >= REQUESTS {
                    return;
                }
                servers.one_request(number).await;
            }
        })
    });
    for client in clients.collect::<Vec<_>>() {
        client.await.unwrap();
    }
    let compared = servers.compared.load(Ordering::SeqCst);
    assert!(compared > REQUESTS * 8 / 10, "{compared} were compared");
    let hits = "vllm:prefix_cache_hits_total";
    assert!(servers.prefill.metric(hits).await > 0.0);
    for server in [&servers.one, &servers.prefill, &servers.decode] {
        assert_empties(server).await;
    }
    println!("{compared} answers compared");
}

impl Servers {
    async fn one_request(&self, number: usize) {
        let mut rng = SmallRng::seed_from_u64(self.seed.wrapping_add(number as u64));
        let Drawn { path, body } = drawn::request(&mut rng, number);
        let id = format!("{number}");
        let port = self.prefill.transfer_port.unwrap();
        let (prefill, mut decode) = bodies(&body, &id, port);
        if rng.random_range(0..10) == 0 {
            return self.cancelled(&mut rng, path, prefill, decode).await;
        }
        let sequential = rng.random_range(0..2) == 0;
        let read = self.prefill.post(path, prefill);
        let (read, answered) = if sequential {
            // As vLLM's proxies do it: what the first answer says is passed on.
            let read = read.await;
            decode["kv_transfer_params"] = read.1["kv_transfer_params"].clone();
            let answered = self.decode.post(path, decode).await;
            (read, answered)
        } else {
            tokio::join!(read, self.decode.post(path, decode))
        };
        let what = format!("request {number} of seed {}", self.seed);
        assert_eq!(read.0, 200, "{what}: {}", read.1);
        assert_eq!(answered.0, 200, "{what}: {}", answered.1);
        let expected = self.one.ok(path, body).await;
        assert_eq!(said(&expected), said(&answered.1), "{what}");
        self.compared.fetch_add(1, Ordering::SeqCst);
    }

    /// Clients that go away, from both servers, at any moment.
    async fn cancelled(
        &self,
        rng: &mut SmallRng,
        path: &'static str,
        prefill: serde_json::Value,
        decode: serde_json::Value,
    ) {
        let [first, second] = [0, 1].map(|_| Duration::from_millis(rng.random_range(0..40)));
        let (read, answered) = (
            self.prefill.post(path, prefill),
            self.decode.post(path, decode),
        );
        let _ = tokio::join!(
            tokio::time::timeout(first, read),
            tokio::time::timeout(second, answered)
        );
    }
}
