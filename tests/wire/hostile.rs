//! Peers that break the protocol. Each is refused with a message, and a transfer in progress is not affected.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use kimi_linear::cache::{CacheHeader, LayerRecord};
use kimi_linear::error::{Refusal, TransferError};
use kimi_linear::transfer::frame::{self, Fetch, Frame};
use kimi_linear::transfer::{Secret, TransferOptions};
use tokio::net::TcpListener;

use crate::bystander::Bystander;
use crate::peers::{consumer, fetch, identity_of, options, outgoing, producer, run, until};
use crate::raw::{Raw, announced};
use crate::records::{Listed, SMALL, assert_same, header, records};

#[test]
fn what_is_not_the_protocol() {
    run(async {
        let producer = producer(options()).await;
        let other = Bystander::begin(&producer, &Secret::none()).await;
        let opening = |version| frame::opening(version, &[1; 32]).to_vec();
        let after = |bytes: &[u8]| [&opening(1)[..], bytes].concat();
        let head = frame::MAX_HEAD as u32;
        let mut damaged = after(
            &Frame::Cancel {
                reason: "no".into(),
            }
            .encode(1),
        );
        *damaged.last_mut().unwrap() ^= 1;
        let cases: [(Vec<u8>, Refusal, &[&str]); 8] = [
            (
                b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec(),
                Refusal::Version,
                &["KLKV", "GET "],
            ),
            (vec![0xff; 4000], Refusal::Version, &["KLKV", "\\xff"]),
            (opening(2), Refusal::Version, &["version 1", "version 2"]),
            (
                after(&announced(99, 0, 0, 0)),
                Refusal::Protocol,
                &["kind", "from 1 to 12", "99"],
            ),
            (
                after(&announced(1, 0, u32::MAX, 0)),
                Refusal::Protocol,
                &["head", "16384 bytes", "4294967295"],
            ),
            (
                after(&announced(7, 0, 0, u32::MAX)),
                Refusal::Protocol,
                &["body", "at most 0 bytes", "4294967295"],
            ),
            (
                after(&announced(5, 0, head, 0)),
                Refusal::Protocol,
                &["took longer than"],
            ),
            (damaged, Refusal::Protocol, &["checksum"]),
        ];
        for (bytes, expected, parts) in cases {
            let mut raw = Raw::to(producer.local_addr()).await;
            raw.send(&bytes).await;
            raw.opening().await;
            let (refusal, sentence) = raw.refused().await;
            assert_eq!(refusal, expected, "{sentence}");
            for part in parts {
                assert!(sentence.contains(part), "no {part:?} in: {sentence}");
            }
        }
        // Cut off at any position.
        let whole = after(&announced(5, 0, 60, 0));
        for length in 0..whole.len() {
            Raw::to(producer.local_addr())
                .await
                .send(&whole[..length])
                .await;
        }
        other.arrives().await;
    });
}

#[test]
fn who_writes_slowly() {
    run(async {
        let hurried = TransferOptions {
            handshake_timeout: Duration::from_millis(400),
            ..options()
        };
        let producer = producer(hurried).await;
        let other = Bystander::begin(&producer, &Secret::none()).await;
        let mut raw = Raw::to(producer.local_addr()).await;
        for byte in frame::opening(1, &[1; 32]) {
            raw.send(&[byte]).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        raw.opening().await;
        // Forty bytes at that rate take twice as long as the handshake may; the refusal comes first.
        let (refusal, sentence) = raw.refused().await;
        assert_eq!(refusal, Refusal::Protocol);
        assert!(
            sentence.contains("the handshake took longer than 400ms"),
            "{sentence}"
        );
        other.arrives().await;
    });
}

#[test]
fn consumers_that_know_the_secret_and_err() {
    run(async {
        let producer = producer(options()).await;
        let other = Bystander::begin(&producer, &Secret::none()).await;
        let identity = identity_of(&SMALL);
        let ask = Fetch {
            id: "y".into(),
            caches: 0,
            tokens: 1,
            have: 0,
            window: 1,
            accepted: false,
        };
        let mut damaged = Frame::Fetch(ask.clone()).encode(1);
        *damaged.last_mut().unwrap() ^= 1;
        let record = records(&header(20, 1), &SMALL, 2).remove(0);
        let record = Frame::Record {
            sequence: 0,
            record: Arc::new(record),
        };
        let with_body = [&record.encode(1)[..], record.body()].concat();
        let cases: [(Vec<u8>, &[&str]); 6] = [
            (damaged, &["checksum"]),
            (
                announced(7, 1, 0, u32::MAX).to_vec(),
                &["body", "67108864 bytes", "4294967295"],
            ),
            (
                announced(7, 1, u32::MAX, 0).to_vec(),
                &["head", "16384 bytes"],
            ),
            (announced(4, 0, 0, 1).to_vec(), &["body", "at most 0 bytes"]),
            (with_body, &["what a consumer sends", "Record"]),
            (
                b"\r\n\r\nno frame at all, but long enough".to_vec(),
                &["kind", "13"],
            ),
        ];
        for (bytes, parts) in cases {
            let mut raw = Raw::consumer(producer.local_addr(), &identity).await;
            raw.send(&bytes).await;
            let (refusal, sentence) = raw.refused().await;
            assert_eq!(refusal, Refusal::Protocol, "{sentence}");
            for part in parts {
                assert!(sentence.contains(part), "no {part:?} in: {sentence}");
            }
        }
        // Records that belong to no transfer have no effect.
        let mut raw = Raw::consumer(producer.local_addr(), &identity).await;
        for frame in [
            Frame::Ack { sequence: 9 },
            Frame::Complete,
            Frame::Cancel {
                reason: String::new(),
            },
        ] {
            raw.frame(77, &frame).await;
        }
        raw.frame(
            77,
            &Frame::Fetch(Fetch {
                accepted: true,
                ..ask
            }),
        )
        .await;
        let Some((77, Frame::Refused { refusal, sentence })) = raw.next().await else {
            panic!("it knows of such a transfer");
        };
        assert_eq!(refusal, Refusal::Unknown);
        assert!(sentence.contains("\"y\" is gone"), "{sentence}");
        other.arrives().await;
    });
}

#[test]
fn too_many_transfers_of_one_consumer() {
    run(async {
        let few = TransferOptions {
            max_transfers: 3,
            ..options()
        };
        let producer = producer(few).await;
        let mut raw = Raw::consumer(producer.local_addr(), &identity_of(&SMALL)).await;
        for number in 1..=4 {
            let fetch = Fetch {
                id: number.to_string(),
                caches: 0,
                tokens: 1,
                have: 0,
                window: 1,
                accepted: false,
            };
            raw.frame(number, &Frame::Fetch(fetch)).await;
        }
        let Some((4, Frame::Refused { refusal, sentence })) = raw.next().await else {
            panic!("the fourth waits");
        };
        assert_eq!(refusal, Refusal::Busy);
        assert!(sentence.contains("has 3 transfers already"), "{sentence}");
        assert_eq!(producer.stats().waiting, 3);
        drop(raw);
    });
}

/// A producer that is written by hand: it accepts, and sends these bytes on each connection.
async fn errs(bytes: Vec<u8>, header: &CacheHeader) -> TransferError {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    // Our code does the handshake; its answer after that is replaced.
    let producer = producer(options()).await;
    let target = producer.local_addr();
    let relay = tokio::spawn(async move {
        loop {
            let mut near = Raw(listener.accept().await.unwrap().0);
            let mut far = Raw::to(target).await;
            let bytes = bytes.clone();
            tokio::spawn(async move {
                let opening = near.opening().await;
                far.send(&opening).await;
                let answer = far.opening().await;
                near.send(&answer).await;
                let (_, prove) = near.next().await.unwrap();
                far.frame(0, &prove).await;
                let (_, welcome) = far.next().await.unwrap();
                near.frame(0, &welcome).await;
                let _asked = near.next().await;
                near.frame(1, &Frame::Accepted).await;
                near.send(&bytes).await;
                while near.next().await.is_some() {}
            });
        }
    });
    let one = TransferOptions {
        connections: 1,
        ..options()
    };
    let error = fetch(&consumer(one), address, "x", header)
        .await
        .unwrap_err();
    relay.abort();
    error
}

#[test]
fn producers_that_err_are_given_up() {
    run(async {
        let header = header(20, 1);
        let all = records(&header, &SMALL, 2);
        let send = |record: LayerRecord, sequence| {
            let record = Frame::Record {
                sequence,
                record: Arc::new(record),
            };
            [&record.encode(1)[..], record.body()].concat()
        };
        let mut damaged = all[0].clone();
        damaged.bytes[3] ^= 1;
        let mut foreign = all[0].clone();
        foreign.id ^= 1;
        let cases = [
            (send(damaged, 0), "is damaged"),
            (send(foreign.sealed(), 0), "model and tokens of a record"),
            (send(all[0].clone(), u64::MAX - 1), "sequence"),
            (announced(7, 1, 0, u32::MAX).to_vec(), "67108864 bytes"),
            (announced(200, 1, 0, 0).to_vec(), "from 1 to 12"),
        ];
        for (bytes, part) in cases {
            let error = errs(bytes, &header).await.to_string();
            assert!(error.contains(part), "no {part:?} in: {error}");
        }
    });
}

#[test]
fn ten_thousand_connections() {
    const ALL: usize = 10_000;
    // Both ends are in this process; if the limit of open files is too low, the oldest connections are closed meanwhile.
    let files = rlimit::increase_nofile_limit(u64::MAX).unwrap() as usize;
    let at_once = ALL.min(files / 2);
    run(async move {
        let limited = TransferOptions {
            max_connections: 16,
            max_handshakes: 8,
            // Consumers that are written by hand send no heartbeats.
            dead_after: Duration::from_secs(60),
            ..options()
        };
        let producer = producer(limited).await;
        let other = Bystander::begin(&producer, &Secret::none()).await;
        let mut open = VecDeque::new();
        for _ in 0..ALL {
            if open.len() == at_once {
                open.pop_front();
            }
            open.push_back(Raw::to(producer.local_addr()).await);
        }
        // All but those in their handshake were refused with a message.
        until("the others are refused", || {
            producer.stats().connections_refused as usize >= ALL - 8
        })
        .await;
        let mut first = open.pop_front().unwrap();
        first.opening().await;
        let (refusal, sentence) = first.refused().await;
        assert_eq!(refusal, Refusal::Busy);
        assert!(sentence.contains("too many connections"), "{sentence}");
        // A consumer with the secret is accepted nevertheless.
        let header = header(20, 1);
        let sent = records(&header, &SMALL, 2);
        let offered = outgoing(&header, Listed::new(sent.clone()));
        let _offer = producer.offer("x".into(), offered).unwrap();
        let late = consumer(options());
        let came = fetch(&late, producer.local_addr(), "x", &header)
            .await
            .unwrap();
        assert_same(&sent, &came);
        other.arrives().await;
        // Authenticated connections have a limit too.
        let identity = identity_of(&SMALL);
        let mut kept = Vec::new();
        let (refusal, sentence) = loop {
            assert!(kept.len() <= 16, "all come in");
            let mut raw = Raw::to(producer.local_addr()).await;
            raw.handshake(b"", &identity).await;
            let Some((0, Frame::Welcome { .. })) = raw.next().await else {
                panic!("no welcome");
            };
            tokio::select! {
                next = raw.next() => match next {
                    Some((0, Frame::Refused { refusal, sentence })) => break (refusal, sentence),
                    other => panic!("{other:?}"),
                },
                () = tokio::time::sleep(Duration::from_millis(300)) => kept.push(raw),
            }
        };
        assert_eq!(refusal, Refusal::Busy);
        assert!(sentence.contains("the limit is 16"), "{sentence}");
    });
}
