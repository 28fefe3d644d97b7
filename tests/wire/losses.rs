//! Connections that are cut, frozen or damaged; peers that disconnect.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use kimi_linear::cache::LayerRecord;
use kimi_linear::error::TransferError;
use kimi_linear::transfer::{
    Consumer, Incoming, Offer, Producer, TransferOptions, TransferOutcome,
};

use crate::peers::{consumer, options, outgoing, producer, run, take_all, until};
use crate::records::{Listed, SMALL, assert_same, header, records};
use crate::relay::Relay;

/// A transfer through a relay.
struct Way {
    producer: Producer,
    consumer: Consumer,
    relay: Relay,
    sent: Vec<LayerRecord>,
    offer: Offer,
    incoming: Incoming,
    /// Has two references as long as the source exists.
    source: Arc<std::sync::atomic::AtomicUsize>,
}

async fn way(tokens: usize, change: impl Fn(TransferOptions) -> TransferOptions) -> Way {
    let producer = producer(change(options())).await;
    let relay = Relay::to(producer.local_addr()).await;
    let consumer = consumer(change(options()));
    let header = header(tokens, 1);
    let sent = records(&header, &SMALL, 2);
    let source = Listed::new(sent.clone());
    let taken = source.taken();
    let offer = producer
        .offer("x".into(), outgoing(&header, source))
        .unwrap();
    let address = relay.address.to_string();
    let incoming = consumer.fetch(&address, "x", 0, &header).await.unwrap();
    Way {
        producer,
        consumer,
        relay,
        sent,
        offer,
        incoming,
        source: taken,
    }
}

impl Way {
    /// Receives the rest; each record must have come once, and both sides must be free.
    async fn arrives(self, mut came: Vec<LayerRecord>) -> (Producer, Consumer) {
        came.extend(take_all(self.incoming).await.unwrap());
        assert_same(&self.sent, &came);
        assert_eq!(self.offer.finished().await, TransferOutcome::Completed);
        until("the source is dropped", || {
            Arc::strong_count(&self.source) == 1
        })
        .await;
        let stats = || [self.producer.stats(), self.consumer.stats()];
        until("nothing is held", || {
            stats()
                .iter()
                .all(|it| (it.active, it.held_bytes) == (0, 0))
        })
        .await;
        (self.producer, self.consumer)
    }
}

/// A small window, so that much remains to be sent.
fn small(options: TransferOptions) -> TransferOptions {
    TransferOptions {
        window_bytes: 20_000,
        ..options
    }
}

#[test]
fn connections_that_are_cut() {
    run(async {
        let mut resent = 0;
        for round in 0..20 {
            let mut way = way(400, small).await;
            // In the middle of a frame, on one connection; the others are cut with it.
            way.relay.cut_in(1_000 + 1_777 * round);
            let mut came = Vec::new();
            while !way.relay.has_cut() {
                let Some(record) = way.incoming.next().await.unwrap() else {
                    break;
                };
                came.push(record);
            }
            let (producer, consumer) = way.arrives(came).await;
            resent += producer.stats().resent;
            assert!(consumer.stats().connections_lost > 0);
        }
        assert!(
            resent > 0,
            "nothing was ever on its way when connections were cut"
        );
    });
}

#[test]
fn a_cut_while_the_engine_takes_nothing() {
    run(async {
        let mut way = way(400, small).await;
        let mut came = vec![way.incoming.next().await.unwrap().unwrap()];
        for _ in 0..3 {
            until("the window is full", || {
                way.consumer.stats().held_bytes > 15_000
            })
            .await;
            way.relay.cut();
            until("they are back", || way.producer.stats().connections == 4).await;
            // Records that wait for the engine came over connections that are gone; taking them must free everything
            // nevertheless.
            for _ in 0..10 {
                came.extend(way.incoming.next().await.unwrap());
            }
        }
        way.arrives(came).await;
    });
}

#[test]
fn all_connections_lost_for_less_than_is_waited() {
    run(async {
        let mut way = way(400, small).await;
        let came = vec![way.incoming.next().await.unwrap().unwrap()];
        way.relay.set_down(true);
        until("they are gone", || {
            way.producer.stats().connections + way.consumer.stats().connections == 0
        })
        .await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(way.producer.stats().active, 1);
        way.relay.set_down(false);
        way.arrives(came).await;
    });
}

#[test]
fn all_connections_lost_for_longer() {
    run(async {
        let soon = |options| TransferOptions {
            resume_timeout: Duration::from_millis(300),
            ..small(options)
        };
        let mut way = way(400, soon).await;
        way.relay.set_down(true);
        let error = loop {
            if let Err(error) = way.incoming.next().await {
                break error;
            }
        };
        assert!(matches!(error, TransferError::Lost { .. }), "{error}");
        assert!(
            error.to_string().contains("did not come back within 300ms"),
            "{error}"
        );
        let TransferOutcome::Failed { reason } = way.offer.finished().await else {
            panic!("it ended otherwise");
        };
        assert!(reason.contains("was not connected for 300ms"), "{reason}");
        until("the source is dropped", || {
            Arc::strong_count(&way.source) == 1
        })
        .await;
        for stats in [
            |it: &Way| it.producer.stats(),
            |it: &Way| it.consumer.stats(),
        ] {
            until("nothing is held", || {
                (stats(&way).active, stats(&way).held_bytes) == (0, 0)
            })
            .await;
            assert_eq!(stats(&way).failed, 1);
        }
    });
}

#[test]
fn connections_that_freeze() {
    run(async {
        let mut way = way(400, small).await;
        let came = vec![way.incoming.next().await.unwrap().unwrap()];
        way.relay.set_frozen(true);
        // Neither side is notified: both must detect it.
        until("both give them up", || {
            way.producer.stats().connections + way.consumer.stats().connections == 0
        })
        .await;
        way.relay.set_frozen(false);
        way.arrives(came).await;
    });
}

#[test]
fn a_short_freeze_is_nothing() {
    run(async {
        let patient = |options| TransferOptions {
            dead_after: Duration::from_secs(30),
            ..small(options)
        };
        let mut way = way(400, patient).await;
        let came = vec![way.incoming.next().await.unwrap().unwrap()];
        way.relay.set_frozen(true);
        tokio::time::sleep(Duration::from_millis(500)).await;
        way.relay.set_frozen(false);
        let (producer, consumer) = way.arrives(came).await;
        assert_eq!(producer.stats().resent, 0);
        assert_eq!(consumer.stats().connections_lost, 0);
    });
}

#[test]
fn damaged_bytes() {
    run(async {
        for round in 0..30 {
            let mut way = way(400, small).await;
            // The bit may be in a record's numbers, in its head, in a header, or in another frame.
            way.relay.damage_in(500 + 997 * round);
            let mut came = Vec::new();
            while !way.relay.has_damaged() {
                let Some(record) = way.incoming.next().await.unwrap() else {
                    break;
                };
                came.push(record);
            }
            let relay_has = way.relay.has_damaged();
            let (_, consumer) = way.arrives(came).await;
            assert!(relay_has, "everything came before byte {round}");
            until("it is seen", || consumer.stats().connections_lost > 0).await;
        }
    });
}

#[test]
fn a_long_way() {
    run(async {
        let way = way(200, small).await;
        way.relay.set_delay(Duration::from_millis(2));
        let relayed = || way.relay.passed();
        assert!(relayed() > 0);
        way.arrives(Vec::new()).await;
    });
}

#[test]
fn a_consumer_that_vanishes_frees_its_producer() {
    run(async {
        let soon = |options| TransferOptions {
            resume_timeout: Duration::from_millis(200),
            ..small(options)
        };
        let way = way(400, soon).await;
        // As when its process is killed: connections end without a last frame.
        way.relay.set_down(true);
        drop(way.consumer);
        assert!(matches!(
            way.offer.finished().await,
            TransferOutcome::Failed { .. }
        ));
        until("the source is dropped", || {
            Arc::strong_count(&way.source) == 1
        })
        .await;
        assert!(take_all(way.incoming).await.is_err());
        assert!(way.source.load(SeqCst) < way.sent.len());
    });
}

#[test]
fn a_producer_that_starts_again_knows_nothing_of_it() {
    run(async {
        let producer = producer(small(options())).await;
        let address = producer.local_addr();
        let consumer = consumer(options());
        let header = header(400, 1);
        let sent = records(&header, &SMALL, 2);
        let _offer = producer
            .offer("x".into(), outgoing(&header, Listed::new(sent)))
            .unwrap();
        let relay = Relay::to(address).await;
        let incoming = consumer
            .fetch(&relay.address.to_string(), "x", 0, &header)
            .await
            .unwrap();
        relay.set_down(true);
        drop(producer);
        let again = loop {
            let identity = crate::peers::identity_of(&SMALL);
            match Producer::listen(address, identity, options()).await {
                Ok(producer) => break producer,
                // The port is free when the first one's tasks have noticed its end.
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        };
        relay.set_down(false);
        let error = take_all(incoming).await.unwrap_err().to_string();
        assert!(error.contains("transfer \"x\" is gone"), "{error}");
        assert_eq!(again.stats().active, 0);
    });
}
