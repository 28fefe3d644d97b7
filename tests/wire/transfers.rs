//! Transfers without failures, only with decisions of the two sides.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use kimi_linear::cache::LayerTensor;
use kimi_linear::config::Dtype;
use kimi_linear::error::{Refusal, TransferError};
use kimi_linear::transfer::{
    Consumer, Outgoing, Producer, TransferOptions, TransferOutcome, TransferStats,
};
use tokio::sync::oneshot;

use crate::peers::{
    consumer, fetch, identity_of, options, outgoing, producer, run, take_all, until,
};
use crate::records::{CHUNK, Listed, SMALL, Stuck, assert_same, header, published, records};

#[test]
fn what_comes_is_what_was_sent() {
    run(async {
        for connections in [1, 4, 8] {
            let producer = producer(options()).await;
            let consumer = consumer(TransferOptions {
                connections,
                ..options()
            });
            for tokens in [1, 7, 100] {
                let header = header(tokens, 1);
                let sent = records(&header, &SMALL, 2);
                let id = tokens.to_string();
                let offer =
                    producer.offer(id.clone(), outgoing(&header, Listed::new(sent.clone())));
                let came = fetch(&consumer, producer.local_addr(), &id, &header)
                    .await
                    .unwrap();
                assert_same(&sent, &came);
                assert_eq!(offer.unwrap().finished().await, TransferOutcome::Completed);
            }
            // Bytes are counted when they are written, and the consumer may read them before.
            until("they are forgotten", || {
                let (sent, came) = (producer.stats(), consumer.stats());
                sent.active == 0 && sent.payload_sent == came.payload_received
            })
            .await;
            let (sent, came) = (producer.stats(), consumer.stats());
            assert_eq!((sent.completed, came.completed), (3, 3));
            assert_eq!(sent.records_sent, came.records_received);
            assert_eq!(sent.payload_sent, came.payload_received);
            assert_eq!((sent.held_bytes, came.held_bytes, sent.active), (0, 0, 0));
        }
    });
}

#[test]
fn a_prefix_that_is_there_is_left_out() {
    run(async {
        let (producer, consumer) = (producer(options()).await, consumer(options()));
        let header = header(5 * CHUNK + 3, 1);
        let sent = records(&header, &SMALL, 2);
        let address = producer.local_addr().to_string();
        for have in [0, CHUNK, 4 * CHUNK] {
            let offer = producer.offer("x".into(), outgoing(&header, Listed::new(sent.clone())));
            let incoming = consumer.fetch(&address, "x", have, &header).await.unwrap();
            let came = take_all(incoming).await.unwrap();
            let mut rest = sent.clone();
            rest.retain(|it| it.tensor != LayerTensor::Latents || it.positions.start >= have);
            assert_same(&rest, &came);
            assert_eq!(offer.unwrap().finished().await, TransferOutcome::Completed);
            until("the name is free again", || producer.stats().active == 0).await;
        }
    });
}

#[test]
fn a_fetch_waits_for_its_offer() {
    run(async {
        let (producer, consumer) = (producer(options()).await, Arc::new(consumer(options())));
        let (header, address) = (header(20, 1), producer.local_addr());
        let sent = records(&header, &SMALL, 2);
        let asked = {
            let (consumer, header) = (Arc::clone(&consumer), header.clone());
            tokio::spawn(async move { fetch(&consumer, address, "x", &header).await })
        };
        until("it waits", || producer.stats().waiting == 1).await;
        assert_eq!(consumer.stats().waiting, 1);
        // Another consumer cannot request the same.
        let other = fetch(&consumer, address, "x", &header).await.unwrap_err();
        assert!(
            matches!(
                &other,
                TransferError::Refused {
                    refusal: Refusal::Taken,
                    ..
                }
            ),
            "{other}"
        );
        let offer = producer
            .offer("x".into(), outgoing(&header, Listed::new(sent.clone())))
            .unwrap();
        assert_same(&sent, &asked.await.unwrap().unwrap());
        assert_eq!(offer.finished().await, TransferOutcome::Completed);
    });
}

#[test]
fn neither_side_waits_for_ever() {
    run(async {
        let short = TransferOptions {
            hold_timeout: Duration::from_millis(200),
            ..options()
        };
        let (producer, consumer) = (producer(short).await, consumer(options()));
        let header = header(20, 1);
        let error = fetch(&consumer, producer.local_addr(), "x", &header)
            .await
            .unwrap_err();
        assert!(
            error
                .to_string()
                .contains("no transfer \"x\" was offered within 200ms"),
            "{error}"
        );
        let source = Listed::new(records(&header, &SMALL, 2));
        let taken = source.taken();
        let offer = producer
            .offer("y".into(), outgoing(&header, source))
            .unwrap();
        assert_eq!(offer.finished().await, TransferOutcome::Expired);
        assert_eq!((taken.load(SeqCst), Arc::strong_count(&taken)), (0, 1));
        assert_eq!((producer.stats().expired, producer.stats().waiting), (1, 0));
    });
}

#[test]
fn what_is_not_complete_is_kept() {
    run(async {
        let short = TransferOptions {
            hold_timeout: Duration::from_millis(50),
            ..options()
        };
        let (producer, consumer) = (producer(short).await, consumer(options()));
        let header = header(20, 1);
        let sent = records(&header, &SMALL, 2);
        let (done, hand_off) = oneshot::channel();
        let outgoing = Outgoing {
            header: header.clone(),
            records: Box::new(Listed::new(sent.clone())),
            hand_off: Box::pin(async { hand_off.await.map_err(|error| error.to_string()) }),
        };
        let offer = producer.offer("x".into(), outgoing).unwrap();
        // Longer than it is kept after it is complete.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let address = producer.local_addr().to_string();
        let incoming = consumer.fetch(&address, "x", 0, &header).await.unwrap();
        done.send(b"the hand-off".to_vec()).unwrap();
        assert_same(&sent, &take_all(incoming).await.unwrap());
        assert_eq!(offer.finished().await, TransferOutcome::Completed);
    });
}

#[test]
fn other_tokens_and_second_offers_are_refused() {
    run(async {
        let (producer, consumer) = (producer(options()).await, consumer(options()));
        let (ours, theirs, address) = (header(20, 1), header(20, 2), producer.local_addr());
        let offer = || {
            producer.offer(
                "x".into(),
                outgoing(&ours, Listed::new(records(&ours, &SMALL, 2))),
            )
        };
        let _first = offer().unwrap();
        let error = offer().err().unwrap().to_string();
        assert!(error.contains("\"x\" is already offered"), "{error}");
        for (asked, part) in [
            (theirs, "other tokens"),
            (header(21, 1), "of 20 tokens here, but 21"),
        ] {
            let error = fetch(&consumer, address, "x", &asked)
                .await
                .unwrap_err()
                .to_string();
            assert!(error.contains(part), "{error}");
        }
        fetch(&consumer, address, "x", &ours).await.unwrap();
        for id in [String::new(), "x".repeat(2000)] {
            let error = fetch(&consumer, address, &id, &ours)
                .await
                .unwrap_err()
                .to_string();
            assert!(error.contains("1 to 1024 bytes"), "{error}");
        }
    });
}

#[test]
fn many_at_once_over_one_pool() {
    run(async {
        let producer = Arc::new(producer(options()).await);
        let consumer = Arc::new(consumer(options()));
        let mut all = tokio::task::JoinSet::new();
        for i in 0..60_u64 {
            let (producer, consumer) = (Arc::clone(&producer), Arc::clone(&consumer));
            all.spawn(async move {
                let header = header(1 + 5 * i as usize, i);
                let sent = records(&header, &SMALL, i);
                let (id, address) = (i.to_string(), producer.local_addr());
                let outgoing = outgoing(&header, Listed::new(sent.clone()));
                // Every other one is requested before it is offered.
                let offer = async {
                    if i % 2 == 0 {
                        tokio::time::sleep(Duration::from_millis(i)).await;
                    }
                    producer.offer(id.clone(), outgoing).unwrap()
                };
                let (_, came) = tokio::join!(offer, fetch(&consumer, address, &id, &header));
                assert_same(&sent, &came.unwrap());
            });
        }
        while let Some(done) = all.join_next().await {
            done.unwrap();
        }
        assert_eq!(consumer.stats().connections, 4);
        until("all are over", || producer.stats().completed == 60).await;
        assert_eq!(producer.stats().resent, 0);
    });
}

#[test]
fn either_side_cancels() {
    run(async {
        // So little at a time that no transfer is finished before it is cancelled.
        let small = || TransferOptions {
            window_bytes: 10_000,
            ..options()
        };
        let (producer, consumer) = (producer(small()).await, consumer(small()));
        let (header, address) = (header(400, 1), producer.local_addr().to_string());
        let source = || {
            let source = Listed::new(records(&header, &SMALL, 2));
            (source.taken(), source)
        };
        // The consumer drops it.
        let (taken, listed) = source();
        let offer = producer
            .offer("a".into(), outgoing(&header, listed))
            .unwrap();
        let mut incoming = consumer.fetch(&address, "a", 0, &header).await.unwrap();
        incoming.next().await.unwrap();
        incoming.cancel("the client went away");
        let reason = "the client went away".to_owned();
        assert_eq!(
            offer.finished().await,
            TransferOutcome::Cancelled { reason }
        );
        until("the source is dropped", || Arc::strong_count(&taken) == 1).await;
        // The producer cancels it, and the consumer receives the reason.
        let (taken, listed) = source();
        let offer = producer
            .offer("b".into(), outgoing(&header, listed))
            .unwrap();
        let incoming = consumer.fetch(&address, "b", 0, &header).await.unwrap();
        offer.cancel("the operator said so");
        let error = take_all(incoming).await.unwrap_err().to_string();
        assert!(error.contains("the operator said so"), "{error}");
        until("the source is dropped", || Arc::strong_count(&taken) == 1).await;
        // Before it is requested.
        let (taken, listed) = source();
        let offer = producer
            .offer("c".into(), outgoing(&header, listed))
            .unwrap();
        offer.cancel("no more");
        until("the source is dropped", || Arc::strong_count(&taken) == 1).await;
        // While the source waits for the device.
        let there = Arc::new(());
        let offer = producer
            .offer("d".into(), outgoing(&header, Stuck::new(&there)))
            .unwrap();
        drop(consumer.fetch(&address, "d", 0, &header).await.unwrap());
        assert!(matches!(
            offer.finished().await,
            TransferOutcome::Cancelled { .. }
        ));
        until("the source is dropped", || Arc::strong_count(&there) == 1).await;
        let stats = || [producer.stats(), consumer.stats()];
        until("nothing is held", || {
            let free = |it: &TransferStats| (it.active, it.waiting, it.held_bytes) == (0, 0, 0);
            stats().iter().all(free)
        })
        .await;
    });
}

#[test]
fn a_request_that_fails_tells_its_consumer() {
    run(async {
        let (producer, consumer) = (producer(options()).await, consumer(options()));
        let (header, address) = (header(100, 1), producer.local_addr());
        let source = Listed::new(records(&header, &SMALL, 2)).failing_at(5);
        let offer = producer
            .offer("a".into(), outgoing(&header, source))
            .unwrap();
        let error = fetch(&consumer, address, "a", &header)
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains("the prompt is empty"), "{error}");
        assert!(matches!(
            offer.finished().await,
            TransferOutcome::Failed { .. }
        ));
        // No hand-off comes, whether that is known before or after the consumer requests it.
        for before in [true, false] {
            let id = format!("hand-off {before}");
            let (fail, failed) = oneshot::channel::<()>();
            let outgoing = Outgoing {
                header: header.clone(),
                records: Box::new(Listed::new(records(&header, &SMALL, 2))),
                hand_off: Box::pin(async {
                    failed.await.ok();
                    Err("a token was not finite".to_owned())
                }),
            };
            let offer = producer.offer(id.clone(), outgoing).unwrap();
            let error = if before {
                fail.send(()).unwrap();
                assert!(matches!(
                    offer.finished().await,
                    TransferOutcome::Failed { .. }
                ));
                fetch(&consumer, address, &id, &header).await.unwrap_err()
            } else {
                let incoming = consumer
                    .fetch(&address.to_string(), &id, 0, &header)
                    .await
                    .unwrap();
                fail.send(()).unwrap();
                take_all(incoming).await.unwrap_err()
            };
            assert!(
                error.to_string().contains("a token was not finite"),
                "{error}"
            );
        }
    });
}

#[test]
fn a_slow_consumer_stops_the_engine() {
    run(async {
        let header = header(2000, 1);
        let sent = records(&header, &SMALL, 2);
        let largest = sent.iter().map(|it| it.bytes.len()).max().unwrap();
        for (ours, theirs) in [(3 * largest, 64 << 20), (64 << 20, 3 * largest)] {
            let limit = |window_bytes| TransferOptions {
                window_bytes,
                ..options()
            };
            let (producer, consumer) = (producer(limit(ours)).await, consumer(limit(theirs)));
            let source = Listed::new(sent.clone());
            let taken = source.taken();
            let _offer = producer
                .offer("x".into(), outgoing(&header, source))
                .unwrap();
            let address = producer.local_addr().to_string();
            let mut incoming = consumer.fetch(&address, "x", 0, &header).await.unwrap();
            let mut came = Vec::new();
            let bytes = |records: usize| {
                sent[..records]
                    .iter()
                    .map(|it| it.bytes.len())
                    .sum::<usize>()
            };
            loop {
                // Records that the engine returned and the other engine did not take: the window, and one record in hand.
                let held = bytes(taken.load(SeqCst)) - bytes(came.len());
                assert!(held <= 3 * largest + largest, "{held} bytes are held");
                assert!(producer.stats().held_bytes as usize <= 3 * largest);
                assert!(consumer.stats().held_bytes as usize <= 3 * largest);
                if came.len() < 20 {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                match incoming.next().await.unwrap() {
                    Some(record) => came.push(record),
                    None => break,
                }
            }
            incoming.hand_off().await.unwrap();
            assert_same(&sent, &came);
            assert!(producer.stats().stalled_for_window > Duration::ZERO);
        }
    });
}

#[test]
fn bytes_of_the_published_shape() {
    run(async {
        // f32 states and convolution states of 20 layers; latents of 7 in the pool's dtype.
        let states = 20 * (32 * 128 * 128 + 3 * 32 * 128 * 3) * 4;
        assert_eq!(states, 44_892_160);
        for (dtype, a_token) in [(Dtype::Bf16, 8_064), (Dtype::F32, 16_128)] {
            let layout = published(dtype);
            let (tokens, id) = (192, identity_of(&layout));
            let header = header(tokens, 1);
            let mut sent = records(&header, &layout, 2);
            for record in &mut sent {
                record.bytes.fill(0);
                *record = record.clone().sealed();
            }
            let producer = Producer::listen("127.0.0.1:0", id.clone(), options())
                .await
                .unwrap();
            let consumer = Consumer::new(id, options());
            let _offer = producer.offer("x".into(), outgoing(&header, Listed::new(sent.clone())));
            let came = fetch(&consumer, producer.local_addr(), "x", &header)
                .await
                .unwrap();
            assert_same(&sent, &came);
            let hand_off = b"the hand-off".len();
            let payload = tokens * a_token + states + hand_off;
            until("all bytes are counted", || {
                producer.stats().payload_sent == payload as u64
            })
            .await;
            let stats = producer.stats();
            assert_eq!(consumer.stats().payload_received, payload as u64);
            // 24 bytes of header and at most 115 of head per record, and a few frames of control.
            assert!(
                stats.framing_sent < (sent.len() * 140 + 4096) as u64,
                "{stats:?}"
            );
        }
    });
}

#[test]
fn a_shutdown_tells_consumers() {
    run(async {
        let (producer, consumer) = (producer(options()).await, Arc::new(consumer(options())));
        let (header, address) = (header(400, 1), producer.local_addr());
        let there = Arc::new(());
        let offer = producer
            .offer("a".into(), outgoing(&header, Stuck::new(&there)))
            .unwrap();
        let incoming = consumer
            .fetch(&address.to_string(), "a", 0, &header)
            .await
            .unwrap();
        let waits = {
            let (consumer, header) = (Arc::clone(&consumer), header.clone());
            tokio::spawn(async move { fetch(&consumer, address, "b", &header).await })
        };
        until("it waits", || producer.stats().waiting == 1).await;
        producer.shutdown().await;
        let errors = [
            take_all(incoming).await.unwrap_err(),
            waits.await.unwrap().unwrap_err(),
        ];
        for error in errors {
            assert!(
                error.to_string().contains("the producer was shut down"),
                "{error}"
            );
        }
        assert!(matches!(
            offer.finished().await,
            TransferOutcome::Failed { .. }
        ));
        until("the source is dropped", || Arc::strong_count(&there) == 1).await;
        let late = producer.offer("c".into(), outgoing(&header, Listed::new(Vec::new())));
        assert!(matches!(late.err().unwrap(), TransferError::Closed));
        let refused = fetch(&consumer, address, "d", &header).await.unwrap_err();
        assert!(
            matches!(
                refused,
                TransferError::Connect { .. } | TransferError::Lost { .. }
            ),
            "{refused}"
        );
    });
}
