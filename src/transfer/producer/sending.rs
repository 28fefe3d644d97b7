//! One active transfer: moves records from the source to the session's queue, as fast as the window allows.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use bytes::Bytes;
use tokio::sync::{Notify, watch};
use tokio::task::{AbortHandle, spawn_blocking};

use super::offer::{Ending, TransferOutcome};
use super::outgoing::{HandOffFuture, RecordSource};
use super::session::{HAND_OFF, Session};
use crate::transfer::frame::Frame;
use crate::transfer::stats::Counters;

/// A hand-off, or the reason why there is none.
type Came = Option<Result<Bytes, String>>;

/// A hand-off that is awaited from the offer on, so that the end of the producer's request is noticed.
pub(super) struct HandOff {
    came: watch::Receiver<Came>,
    task: AbortHandle,
}

impl HandOff {
    pub(super) fn new(runtime: &tokio::runtime::Handle, future: HandOffFuture) -> Self {
        let (sender, came) = watch::channel(None);
        let task = runtime.spawn(async move {
            let result = future.await.map(Bytes::from);
            sender.send_replace(Some(result));
        });
        Self {
            came,
            task: task.abort_handle(),
        }
    }

    /// The task that waits for it.
    pub(super) fn waiter(&self) -> watch::Receiver<Came> {
        self.came.clone()
    }

    /// The reason why there will be no hand-off, if it is known.
    pub(super) fn failure(&self) -> Option<String> {
        let came = self.came.borrow();
        came.as_ref().and_then(|came| came.as_ref().err().cloned())
    }
}

/// Waits for a hand-off.
pub(super) async fn came(mut waiter: watch::Receiver<Came>) -> Result<Bytes, String> {
    let came = waiter.wait_for(Option::is_some).await;
    let came = came.ok().and_then(|came| came.clone());
    came.unwrap_or_else(|| Err("the request ended without a hand-off".to_owned()))
}

impl Drop for HandOff {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A transfer to one consumer.
pub(super) struct Transfer {
    pub(super) session: Arc<Session>,
    pub(super) number: u32,
    pub(super) window: usize,
    /// Tokens whose latents the consumer has.
    pub(super) have: usize,
    pub(super) records: Box<dyn RecordSource>,
    pub(super) hand_off: HandOff,
    pub(super) ending: Arc<Ending>,
    pub(super) counters: Arc<Counters>,
}

impl Transfer {
    /// Runs it and returns how it ended. The session registers the transfer before and removes it after.
    pub(super) async fn run(self, space: Arc<Notify>) -> TransferOutcome {
        let stop = self.records.stopper();
        let ending = Arc::clone(&self.ending);
        tokio::select! {
            outcome = ending.wait() => {
                if let Some(stop) = stop {
                    stop();
                }
                outcome
            }
            reason = self.send(&space) => {
                ending.set(TransferOutcome::Failed { reason });
                ending.wait().await
            }
        }
    }

    /// Sends everything, then stays pending; returns only on failure. The source is dropped with the future, when the
    /// transfer has ended: the request behind it may end with it.
    async fn send(self, space: &Notify) -> String {
        let Self {
            session,
            number,
            window,
            have,
            mut records,
            hand_off,
            ending: _,
            counters,
        } = self;
        let mut sequence = 0;
        loop {
            wait(&session, number, space, &counters, |held| held < window).await;
            let taken = spawn_blocking(move || {
                if sequence == 0 && have > 0 {
                    records.skip_latents(have);
                }
                let record = records.next_record();
                (records, record)
            });
            let record;
            (records, record) = match taken.await {
                Ok(taken) => taken,
                Err(error) => return format!("the records could not be read: {error}"),
            };
            let record = match record {
                None => break,
                Some(Ok(record)) => Arc::new(record),
                Some(Err(error)) => return error.to_string(),
            };
            let length = record.bytes.len();
            let fits = |held: usize| held == 0 || held + length <= window;
            wait(&session, number, space, &counters, fits).await;
            session.push(number, sequence, Frame::Record { sequence, record });
            sequence += 1;
            counters.records.fetch_add(1, Relaxed);
        }
        match came(hand_off.waiter()).await {
            Ok(bytes) => {
                let records = sequence;
                session.push(number, HAND_OFF, Frame::HandOff { records, bytes });
                std::future::pending().await
            }
            Err(reason) => reason,
        }
    }
}

/// Waits until a transfer holds at most this many bytes.
async fn wait(
    session: &Session,
    number: u32,
    space: &Notify,
    counters: &Counters,
    enough: impl Fn(usize) -> bool,
) {
    let mut since = None;
    while !enough(session.held(number)) {
        since.get_or_insert_with(Instant::now);
        space.notified().await;
    }
    if let Some(since) = since {
        counters.stalled_for_window(since.elapsed());
    }
}
