//! A producer and a consumer in one process, with short timeouts.

use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;

use kimi_linear::cache::{CacheHeader, CacheLayout, LayerRecord};
use kimi_linear::checkpoint::Fingerprint;
use kimi_linear::error::TransferError;
use kimi_linear::transfer::{
    Consumer, Identity, Incoming, Outgoing, Producer, RecordSource, TransferOptions,
};

use crate::records::SMALL;

pub fn identity_of(layout: &CacheLayout) -> Identity {
    Identity::of(Fingerprint(7), layout, "bf16")
}

pub fn options() -> TransferOptions {
    TransferOptions {
        heartbeat: Duration::from_millis(100),
        dead_after: Duration::from_secs(1),
        handshake_timeout: Duration::from_secs(5),
        resume_timeout: Duration::from_secs(20),
        hold_timeout: Duration::from_secs(20),
        ..TransferOptions::default()
    }
}

pub async fn producer(options: TransferOptions) -> Producer {
    let identity = identity_of(&SMALL);
    Producer::listen("127.0.0.1:0", identity, options)
        .await
        .unwrap()
}

pub fn consumer(options: TransferOptions) -> Consumer {
    Consumer::new(identity_of(&SMALL), options)
}

/// The offer of these caches; the hand-off is available at once.
pub fn outgoing(header: &CacheHeader, records: impl RecordSource + 'static) -> Outgoing {
    Outgoing {
        header: header.clone(),
        records: Box::new(records),
        hand_off: Box::pin(async { Ok(b"the hand-off".to_vec()) }),
    }
}

/// Receives everything.
pub async fn take_all(mut incoming: Incoming) -> Result<Vec<LayerRecord>, TransferError> {
    let mut records = Vec::new();
    while let Some(record) = incoming.next().await? {
        records.push(record);
    }
    assert_eq!(incoming.hand_off().await?, b"the hand-off");
    Ok(records)
}

pub async fn fetch(
    consumer: &Consumer,
    address: SocketAddr,
    id: &str,
    header: &CacheHeader,
) -> Result<Vec<LayerRecord>, TransferError> {
    take_all(consumer.fetch(&address.to_string(), id, 0, header).await?).await
}

/// Runs a test that must not hang.
pub fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let limit = Duration::from_secs(120);
        tokio::time::timeout(limit, test)
            .await
            .expect("the test hangs");
    });
    runtime.shutdown_background();
}

/// Waits for a condition that becomes true without further action.
pub async fn until(what: &str, mut is: impl FnMut() -> bool) {
    for _ in 0..3000 {
        if is() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not within 30 s: {what}");
}
