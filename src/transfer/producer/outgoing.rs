//! What an engine sends: its caches, record by record, and the hand-off for the other engine.

use std::pin::Pin;
use std::sync::Arc;

use crate::cache::{CacheHeader, LayerRecord};
use crate::error::Error;

/// Caches as they are computed, one record at a time. It is used by one thread at a time, and may wait for the device.
pub trait RecordSource: Send {
    /// Leaves out latents of the first `tokens` tokens, which the consumer has. Called at most once, before the first record.
    fn skip_latents(&mut self, tokens: usize);

    /// Waits for the next record; `None` after the last. No record follows an error.
    fn next_record(&mut self) -> Option<Result<LayerRecord, Arc<Error>>>;

    /// A function that makes a [`RecordSource::next_record`] waiting in another thread return when the transfer is cancelled.
    /// Without it the source is dropped after the record that it waits for.
    fn stopper(&self) -> Option<Box<dyn FnOnce() + Send>> {
        None
    }
}

/// What the receiving engine needs to continue, once the first tokens are sampled; an error gives the reason why there is
/// none.
pub type HandOffFuture = Pin<Box<dyn Future<Output = Result<Vec<u8>, String>> + Send>>;

/// A transfer to offer to a consumer.
pub struct Outgoing {
    /// The model and tokens of the caches. A consumer that requests others is refused.
    pub header: CacheHeader,
    /// The caches. No record is taken before a consumer fetches them.
    pub records: Box<dyn RecordSource>,
    /// The hand-off that follows them.
    pub hand_off: HandOffFuture,
}
