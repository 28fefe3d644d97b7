//! What an engine gives away: its caches, record by record, and what the other engine goes on with.

use std::pin::Pin;
use std::sync::Arc;

use crate::cache::{CacheHeader, LayerRecord};
use crate::error::Error;

/// Caches as they are computed, a record at a time. It is used by one thread after the other, and may wait for the device.
pub trait RecordSource: Send {
    /// Leaves out latents of the first `tokens` tokens, which the consumer has. Called once at most, before the first record.
    fn skip_latents(&mut self, tokens: usize);

    /// Waits for the next record; `None` when all have come. After an error nothing comes.
    fn next_record(&mut self) -> Option<Result<LayerRecord, Arc<Error>>>;

    /// What makes a [`RecordSource::next_record`] that waits in another thread give up, when the transfer is cancelled. Without it the
    /// source is dropped after the record that it waits for.
    fn stopper(&self) -> Option<Box<dyn FnOnce() + Send>> {
        None
    }
}

/// What the receiving engine goes on with, once the first tokens are drawn; an error says why there is none.
pub type HandOffFuture = Pin<Box<dyn Future<Output = Result<Vec<u8>, String>> + Send>>;

/// What is offered to a consumer.
pub struct Outgoing {
    /// What the caches are of. A consumer that asks for others is refused.
    pub header: CacheHeader,
    /// The caches. Nothing is taken before a consumer asks.
    pub records: Box<dyn RecordSource>,
    /// What comes after them.
    pub hand_off: HandOffFuture,
}
