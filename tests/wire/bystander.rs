//! A transfer that must not be affected by other peers.

use kimi_linear::cache::LayerRecord;
use kimi_linear::transfer::{Consumer, Incoming, Offer, Producer, Secret, TransferOptions};

use crate::peers::{consumer, options, outgoing, take_all};
use crate::records::{Listed, SMALL, assert_same, header, records};

/// A transfer in progress while other peers misbehave.
pub struct Bystander {
    _consumer: Consumer,
    incoming: Incoming,
    _offer: Offer,
    sent: Vec<LayerRecord>,
    first: LayerRecord,
}

impl Bystander {
    pub async fn begin(producer: &Producer, secret: &Secret) -> Self {
        let small = TransferOptions {
            window_bytes: 10_000,
            secret: secret.clone(),
            ..options()
        };
        let consumer = consumer(small);
        let header = header(300, 5);
        let sent = records(&header, &SMALL, 6);
        let offered = outgoing(&header, Listed::new(sent.clone()));
        let offer = producer.offer("other".into(), offered).unwrap();
        let address = producer.local_addr().to_string();
        let mut incoming = consumer.fetch(&address, "other", 0, &header).await.unwrap();
        let first = incoming.next().await.unwrap().unwrap();
        Self {
            _consumer: consumer,
            incoming,
            _offer: offer,
            sent,
            first,
        }
    }

    /// It arrives unaffected.
    pub async fn arrives(self) {
        let mut came = vec![self.first];
        came.extend(take_all(self.incoming).await.unwrap());
        assert_same(&self.sent, &came);
    }
}
