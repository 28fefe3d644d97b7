//! What can go wrong between two servers, at random moments, a hundred times: never a wrong token, and nothing is lost on the one
//! that is left.

use std::time::Duration;

use futures_util::future::join_all;
use kimi_linear::connector::{KvTransfer, LoadFailure};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;

use super::super::harness::{Running, Setup};
use super::super::seeds;
use super::drawn::{self, Drawn};
use super::relay::{Link, Relay};
use super::{assert_empties, bodies, consumer, producer, said, setup};

const ROUNDS: usize = 100;

/// Requests of a round.
const AT_ONCE: usize = 4;

#[derive(Clone, Copy, Debug)]
enum Fault {
    /// The prefill server is gone, and another one comes up.
    ProducerKilled,
    /// The decode server is gone, and another one comes up.
    ConsumerKilled,
    /// The link is cut for so long.
    Cut(Duration),
    /// The link carries nothing for so long, and nobody says so.
    HalfOpen(Duration),
    /// The decode server has no room for a while.
    Full,
}

fn fault(rng: &mut SmallRng, round: usize) -> Fault {
    let pause = |rng: &mut SmallRng| Duration::from_millis(rng.random_range(0..600));
    match round % 5 {
        // A lost producer is waited for; where that takes long, it is lost less often.
        0 if round % 10 == 5 || round.is_multiple_of(20) => Fault::ProducerKilled,
        1 => Fault::ConsumerKilled,
        // Longer than the link is thought dead after.
        2 if round == 2 || round == 52 => Fault::Cut(Duration::from_secs(5)),
        2 => Fault::Cut(pause(rng)),
        3 if round == 3 => Fault::HalfOpen(Duration::from_secs(5)),
        3 => Fault::HalfOpen(pause(rng)),
        _ => Fault::Full,
    }
}

struct Pair {
    prefill: Running,
    decode: Running,
    relay: Relay,
    policy: LoadFailure,
    resume: Duration,
}

/// A server that waits so long for the other side.
fn lasting(mut transfers: KvTransfer, resume: Duration) -> Setup {
    transfers.options.resume_timeout = resume;
    transfers.options.hold_timeout = Duration::from_secs(6);
    setup(Some(transfers))
}

impl Pair {
    /// With a `resume` longer than some of the faults.
    async fn start(policy: LoadFailure, resume: Duration) -> Self {
        let prefill = lasting(producer(), resume).start_apart().await;
        let relay = Relay::to(prefill.transfer_port.unwrap()).await;
        let decode = lasting(consumer(policy), resume).start_apart().await;
        Self {
            prefill,
            decode,
            relay,
            policy,
            resume,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_fault_makes_a_wrong_token_or_loses_room() {
    let seed = seeds::printed(seeds::drawn());
    let mut rng = SmallRng::seed_from_u64(seed);
    let one = setup(None).start().await;
    let mut pairs = [
        Pair::start(LoadFailure::Recompute, Duration::from_secs(7)).await,
        Pair::start(LoadFailure::Fail, Duration::from_secs(1)).await,
    ];
    let (mut finished, mut failed) = (0, 0);
    for round in 0..ROUNDS {
        let fault = fault(&mut rng, round);
        let pair = &mut pairs[round / 5 % 2];
        let drawn: Vec<Drawn> = (0..AT_ONCE)
            .map(|i| drawn::request(&mut rng, round * AT_ONCE + i))
            .collect();
        let after = Duration::from_millis(rng.random_range(0..60));
        let what = format!("seed {seed}, round {round}, {fault:?} after {after:?}");
        let answers = pair.run(&drawn, round, fault, after).await;
        let killed = matches!(fault, Fault::ConsumerKilled);
        for (drawn, answer) in drawn.iter().zip(answers) {
            match answer {
                Some((200, answer)) => {
                    let expected = one.ok(drawn.path, drawn.body.clone()).await;
                    assert_eq!(said(&expected), said(&answer), "{what}");
                    finished += 1;
                }
                // A server that is being killed may still say so.
                Some((503, answer)) if killed => {
                    let message = &answer["error"]["message"];
                    assert_eq!(message, "the engine has stopped", "{what}: {answer}");
                }
                Some((status, answer)) => {
                    assert_eq!(pair.policy, LoadFailure::Fail, "{what}: {status} {answer}");
                    assert_eq!(
                        answer["error"]["code"], "kv_load_failed",
                        "{what}: {answer}"
                    );
                    failed += 1;
                }
                None => assert!(killed, "{what}: no answer"),
            }
        }
        pair.repair(fault).await;
    }
    println!("{finished} finished, {failed} failed");
    assert!(finished > ROUNDS * AT_ONCE / 2, "{finished} and {failed}");
    for pair in &pairs {
        assert_empties(&pair.decode).await;
        assert_empties(&pair.prefill).await;
    }
}

impl Pair {
    /// Asks both servers, and has the fault happen in between. An answer is `None` where its server is gone.
    async fn run(
        &self,
        drawn: &[Drawn],
        round: usize,
        fault: Fault,
        after: Duration,
    ) -> Vec<Option<(u16, Value)>> {
        let ask = |(i, drawn): (usize, &Drawn)| {
            let id = format!("{round}-{i}");
            let (prefill, decode) = bodies(&drawn.body, &id, self.relay.port);
            let path = drawn.path;
            async move {
                let read = self.prefill.try_post(path, &prefill);
                let (_, answered) = tokio::join!(read, self.decode.try_post(path, &decode));
                answered
            }
        };
        let answers = join_all(drawn.iter().enumerate().map(ask));
        let happens = async {
            tokio::time::sleep(after).await;
            match fault {
                Fault::ProducerKilled => self.prefill.kill(),
                Fault::ConsumerKilled => self.decode.kill(),
                Fault::Cut(pause) => self.link(Link::Cut, pause).await,
                Fault::HalfOpen(pause) => self.link(Link::Still, pause).await,
                Fault::Full => self.fill().await,
            }
        };
        tokio::join!(answers, happens).0
    }

    async fn link(&self, link: Link, pause: Duration) {
        self.relay.set(link);
        tokio::time::sleep(pause).await;
        self.relay.set(Link::Up);
    }

    /// Takes all the decode server's blocks for a while.
    async fn fill(&self) {
        let prompt: Vec<u32> = (0..3500).map(|i| i % 249).collect();
        let body = serde_json::json!({ "prompt": [prompt, prompt], "max_tokens": 2 });
        let _ = self.decode.post("/v1/completions", body).await;
    }

    /// What is gone comes up again; the one that is left has everything back.
    async fn repair(&mut self, fault: Fault) {
        match fault {
            Fault::ProducerKilled => {
                self.prefill = lasting(producer(), self.resume).start_apart().await;
                self.relay.move_to(self.prefill.transfer_port.unwrap());
                // Connections to the old one are over.
                self.link(Link::Cut, Duration::from_millis(1)).await;
                assert_empties(&self.decode).await;
            }
            Fault::ConsumerKilled => {
                self.decode = lasting(consumer(self.policy), self.resume)
                    .start_apart()
                    .await;
            }
            _ => {}
        }
    }
}
