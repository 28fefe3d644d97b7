//! Cache events: which prefixes this worker has, for a router that sends prompts to where their beginning is cached.
//!
//! The engine tells of whole blocks that a KDA checkpoint backs, and of those that none backs any more: a latent block without a state
//! before it is of no use. It tells them in its own thread, into a channel; a task gives them Dynamo's names and publishes them.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

use dynamo_backend_common::KvEventPublisher;
use dynamo_kv_router::protocols::{
    BlockHashOptions, ExternalSequenceBlockHash, KvCacheEvent, KvCacheEventData, KvCacheRemoveData,
    KvCacheStoreData, KvCacheStoredBlockData, compute_block_hash_for_seq, compute_next_seq_hash,
};
use kimi_linear::cache::{BlockHash, CacheObserver};
use kimi_linear::engine::{BLOCK_TOKENS, EngineHandle};
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::task::spawn_blocking;

/// Tokens of a block, as Dynamo writes it.
pub(super) const BLOCK: u32 = BLOCK_TOKENS as u32;

/// Maximum number of events that are published at once.
const BATCH: usize = 1024;

/// What the engine tells, with its names of blocks.
enum Change<B = BlockHash> {
    Stored {
        parent: Option<B>,
        block: B,
        tokens: Vec<u32>,
    },
    Removed(B),
}

/// Passes on what the engine tells. The receiver may be gone: then a later observer has taken over.
struct Observer(UnboundedSender<Change>);

impl CacheObserver for Observer {
    fn stored(&mut self, parent: Option<BlockHash>, block: BlockHash, tokens: &[u32]) {
        let tokens = tokens.to_vec();
        let _ = self.0.send(Change::Stored {
            parent,
            block,
            tokens,
        });
    }

    fn removed(&mut self, block: BlockHash) {
        let _ = self.0.send(Change::Removed(block));
    }
}

/// Publishes the engine's cached blocks from now on, those that it has already first. The engine has one such observer: the last
/// role's, whose events end.
pub(super) fn publish(engine: EngineHandle, publisher: Arc<KvEventPublisher>) {
    let (sender, receiver) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let observing = spawn_blocking(move || engine.observe_cache(Box::new(Observer(sender))));
        if !matches!(observing.await, Ok(Ok(()))) {
            tracing::warn!("the engine has stopped: no cache events are published");
            return;
        }
        forward(receiver, |events| publisher.publish_batch(events).is_ok()).await;
    });
}

/// Publishes changes until the engine or the publisher ends.
async fn forward<B: Eq + Hash>(
    mut changes: UnboundedReceiver<Change<B>>,
    mut publish: impl FnMut(Vec<KvCacheEvent>) -> bool,
) {
    let mut names = Names::new();
    let mut batch = Vec::with_capacity(BATCH);
    // Whatever a router still has of this worker is of an earlier role.
    let mut events = vec![names.event(KvCacheEventData::Cleared)];
    loop {
        if !publish(events) || changes.recv_many(&mut batch, BATCH).await == 0 {
            return;
        }
        let data = batch.drain(..).filter_map(|change| names.data(change));
        let data: Vec<_> = data.collect();
        events = data.into_iter().map(|data| names.event(data)).collect();
    }
}

/// Dynamo's names of the engine's blocks.
struct Names<B> {
    /// The hash of a block's tokens and of all before it.
    sequences: HashMap<B, u64>,
    /// Number of the next event.
    next: u64,
}

impl<B: Eq + Hash> Names<B> {
    fn new() -> Self {
        Self {
            sequences: HashMap::new(),
            next: 0,
        }
    }

    fn event(&mut self, data: KvCacheEventData) -> KvCacheEvent {
        let event_id = self.next;
        self.next += 1;
        KvCacheEvent {
            event_id,
            data,
            dp_rank: 0,
        }
    }

    /// Dynamo's form of a change; `None` for a block whose parent is not known, or that was never told.
    fn data(&mut self, change: Change<B>) -> Option<KvCacheEventData> {
        match change {
            Change::Stored {
                parent,
                block,
                tokens,
            } => {
                let hashes =
                    compute_block_hash_for_seq(&tokens, BLOCK, BlockHashOptions::default());
                let tokens_hash = *hashes.first()?;
                let parent = match parent {
                    None => None,
                    Some(parent) => Some(*self.sequences.get(&parent)?),
                };
                let sequence = match parent {
                    None => tokens_hash.0,
                    Some(parent) => compute_next_seq_hash(parent, tokens_hash),
                };
                self.sequences.insert(block, sequence);
                Some(KvCacheEventData::Stored(KvCacheStoreData {
                    parent_hash: parent.map(ExternalSequenceBlockHash),
                    start_position: None,
                    blocks: vec![KvCacheStoredBlockData {
                        block_hash: ExternalSequenceBlockHash(sequence),
                        tokens_hash,
                        mm_extra_info: None,
                    }],
                }))
            }
            Change::Removed(block) => {
                let sequence = self.sequences.remove(&block)?;
                Some(KvCacheEventData::Removed(KvCacheRemoveData {
                    block_hashes: vec![ExternalSequenceBlockHash(sequence)],
                }))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dynamo_kv_router::protocols::compute_seq_hash_for_block;

    #[test]
    fn names_are_those_that_a_router_computes_from_the_tokens() {
        let tokens: Vec<u32> = (0..3 * BLOCK).collect();
        let expected = {
            let hashes = compute_block_hash_for_seq(&tokens, BLOCK, BlockHashOptions::default());
            compute_seq_hash_for_block(&hashes)
        };
        let blocks = ["first", "second", "third"];
        let mut names = Names::new();
        let mut found = Vec::new();
        for (i, block) in blocks.iter().enumerate() {
            let change = Change::Stored {
                parent: i.checked_sub(1).map(|before| blocks[before]),
                block: *block,
                tokens: tokens[i * BLOCK_TOKENS..(i + 1) * BLOCK_TOKENS].to_vec(),
            };
            let Some(KvCacheEventData::Stored(stored)) = names.data(change) else {
                panic!("block {i} is not stored");
            };
            let before = i.checked_sub(1).map(|before| expected[before]);
            assert_eq!(stored.parent_hash.map(|parent| parent.0), before);
            found.push(stored.blocks[0].block_hash.0);
        }
        assert_eq!(found, expected);
        let Some(KvCacheEventData::Removed(removed)) = names.data(Change::Removed(blocks[2]))
        else {
            panic!("it is not removed");
        };
        assert_eq!(removed.block_hashes[0].0, expected[2]);
        // Neither is it removed twice, nor does anything follow a block that is not there.
        assert!(names.data(Change::Removed(blocks[2])).is_none());
        let orphan = Change::Stored {
            parent: Some(blocks[2]),
            block: blocks[0],
            tokens: tokens[..BLOCK_TOKENS].to_vec(),
        };
        assert!(names.data(orphan).is_none());
    }

    #[tokio::test]
    async fn a_new_role_begins_with_nothing_cached() {
        let (sender, receiver) = mpsc::unbounded_channel();
        let tokens: Vec<u32> = (0..BLOCK).collect();
        let stored = Change::Stored {
            parent: None,
            block: "first",
            tokens,
        };
        assert!(sender.send(stored).is_ok());
        drop(sender);
        let mut published = Vec::new();
        forward(receiver, |events| {
            published.extend(events);
            true
        })
        .await;
        let ids: Vec<_> = published.iter().map(|event| event.event_id).collect();
        assert_eq!(ids, [0, 1]);
        assert_eq!(published[0].data, KvCacheEventData::Cleared);
        assert!(matches!(published[1].data, KvCacheEventData::Stored(_)));
    }
}
