//! Peers without the secret, or with other caches.

use kimi_linear::backend::Shard;
use kimi_linear::cache::CacheLayout;
use kimi_linear::checkpoint::Fingerprint;
use kimi_linear::config::Dtype;
use kimi_linear::error::{Refusal, TransferError};
use kimi_linear::transfer::frame::{self, Frame};
use kimi_linear::transfer::{Consumer, Identity, Secret, TransferOptions};
use tokio::net::TcpListener;

use crate::bystander::Bystander;
use crate::peers::{consumer, fetch, identity_of, options, outgoing, producer, run};
use crate::raw::{Raw, refusal};
use crate::records::{Listed, SMALL, header, records};

fn secret(text: &str) -> Secret {
    Secret::new(text.as_bytes()).unwrap()
}

#[test]
fn who_does_not_know_the_secret() {
    run(async {
        let right = secret("the right secret, long enough");
        let with = |secret: &Secret| TransferOptions {
            secret: secret.clone(),
            ..options()
        };
        let producer = producer(with(&right)).await;
        let other = Bystander::begin(&producer, &right).await;
        let header = header(20, 1);
        let offered = outgoing(&header, Listed::new(records(&header, &SMALL, 2)));
        let _offer = producer.offer("x".into(), offered).unwrap();
        for wrong in [secret("another secret, long enough"), Secret::none()] {
            let wrong = consumer(with(&wrong));
            let error = fetch(&wrong, producer.local_addr(), "x", &header)
                .await
                .unwrap_err();
            assert_eq!(refusal(&error), Refusal::Secret);
            assert!(error.to_string().contains("the same secret"), "{error}");
        }
        let known = consumer(with(&right));
        fetch(&known, producer.local_addr(), "x", &header)
            .await
            .unwrap();
        let error = Secret::new(b"short").unwrap_err().to_string();
        assert!(error.contains("at least 16 bytes, but has 5"), "{error}");
        other.arrives().await;
    });
}

#[test]
fn a_producer_that_does_not_know_the_secret() {
    run(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let mut raw = Raw(listener.accept().await.unwrap().0);
            let opening = raw.opening().await;
            let nonce = frame::parse_opening(&opening).unwrap();
            // The consumer's own nonce and proof, sent back to it.
            raw.send(&frame::opening(frame::VERSION, &nonce)).await;
            let Some((
                _,
                Frame::Prove {
                    proof, identity, ..
                },
            )) = raw.next().await
            else {
                panic!("the consumer proves nothing");
            };
            raw.frame(0, &Frame::Welcome { proof, identity }).await;
            raw.next().await;
        });
        let known = TransferOptions {
            secret: secret("a secret, long enough"),
            ..options()
        };
        let error = fetch(&consumer(known), address, "x", &header(20, 1))
            .await
            .unwrap_err();
        assert!(matches!(error, TransferError::Secret), "{error}");
    });
}

#[test]
fn whose_caches_are_others() {
    let with = |change: fn(&mut CacheLayout)| {
        let mut layout = SMALL;
        change(&mut layout);
        identity_of(&layout)
    };
    let others = [
        (
            Identity::of(Fingerprint(8), &SMALL, "bf16"),
            "model fingerprint",
            "00007",
            "00008",
        ),
        (
            Identity::of(Fingerprint(7), &SMALL, "q4_0"),
            "weight format",
            "bf16",
            "q4_0",
        ),
        (
            with(|it| it.latents.dtype = Dtype::Bf16),
            "cache dtype",
            "f32",
            "bf16",
        ),
        (
            with(|it| it.states.layers = 4),
            "number of KDA layers",
            "3",
            "4",
        ),
        (
            with(|it| it.states.value_heads = 4),
            "number of value heads",
            "2",
            "4",
        ),
        (
            with(|it| it.states.key_width = 32),
            "width of a key",
            "16",
            "32",
        ),
        (
            with(|it| it.states.taps = 3),
            "taps of the convolution",
            "4",
            "3",
        ),
        (
            with(|it| it.latents.layers = 1),
            "number of MLA layers",
            "2",
            "1",
        ),
        (
            with(|it| it.latents.latent = 32),
            "width of a latent",
            "16",
            "32",
        ),
        (
            with(|it| it.latents.rope = 8),
            "width of the shared key",
            "4",
            "8",
        ),
        (
            with(|it| {
                it.shard = Shard { rank: 1, ranks: 2 };
                (it.states.key_heads, it.states.value_heads) = (1, 1);
            }),
            "head range",
            "rank 0 of 1",
            "rank 1 of 2",
        ),
    ];
    run(async move {
        let producer = producer(options()).await;
        let other = Bystander::begin(&producer, &Secret::none()).await;
        for (identity, what, ours, theirs) in others {
            let foreign = Consumer::new(identity, options());
            let error = fetch(&foreign, producer.local_addr(), "x", &header(20, 1)).await;
            let error = error.unwrap_err();
            assert_eq!(refusal(&error), Refusal::Identity);
            let message = error.to_string();
            for part in [what, ours, theirs] {
                assert!(message.contains(part), "no {part:?} in: {message}");
            }
        }
        // Sizes of pools and of blocks may differ between the sides.
        let mut layout = SMALL;
        (
            layout.states.slots,
            layout.latents.blocks,
            layout.latents.block_tokens,
        ) = (9, 9, 16);
        let header = header(20, 1);
        let offered = outgoing(&header, Listed::new(records(&header, &SMALL, 2)));
        let _offer = producer.offer("x".into(), offered).unwrap();
        let consumer = Consumer::new(identity_of(&layout), options());
        fetch(&consumer, producer.local_addr(), "x", &header)
            .await
            .unwrap();
        other.arrives().await;
    });
}

#[test]
fn a_consumer_compares_too() {
    run(async {
        // A producer that accepts every peer: the consumer must detect that its caches are others.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let mut raw = Raw(listener.accept().await.unwrap().0);
            raw.opening().await;
            raw.send(&frame::opening(3, &[0; 32])).await;
            raw.next().await;
        });
        let error = fetch(&consumer(options()), address, "x", &header(20, 1))
            .await
            .unwrap_err();
        assert!(
            matches!(error, TransferError::Version { ours: 1, theirs: 3 }),
            "{error}"
        );
        let (ours, theirs) = (
            identity_of(&SMALL),
            Identity::of(Fingerprint(8), &SMALL, "bf16"),
        );
        let message = ours.check(&theirs).unwrap_err().to_string();
        assert!(message.contains("model fingerprint"), "{message}");
        ours.check(&ours).unwrap();
    });
}
