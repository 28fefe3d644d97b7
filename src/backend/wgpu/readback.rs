//! Reads back from the device: copies to a mappable buffer, and the ticket that waits for it.
//!
//! Natively the thread that awaits the ticket drives the device meanwhile (`backend::ticket`); in a browser the event loop does.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use super::Shared;
use crate::backend::{Result, Ticket, await_device};
use crate::error::BackendError;

/// Buffers that can be used again.
#[derive(Default)]
pub(super) struct Spare(Mutex<Vec<wgpu::Buffer>>);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Spare {
    /// A mappable buffer of at least `bytes`.
    pub(super) fn take(&self, shared: &Shared, bytes: u64) -> Result<wgpu::Buffer> {
        let mut spare = lock(&self.0);
        if let Some(at) = spare.iter().position(|buffer| buffer.size() >= bytes) {
            return Ok(spare.swap_remove(at));
        }
        // A buffer that is too small now would be too small next time as well.
        spare.pop();
        drop(spare);
        let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        shared.gpu.buffer_for("answers of a step", bytes, usage)
    }

    fn give(&self, buffer: wgpu::Buffer) {
        lock(&self.0).push(buffer);
    }
}

/// The result of the mapping, and the waker of the waiting task.
#[derive(Default)]
struct Mapping {
    result: Option<std::result::Result<(), String>>,
    waker: Option<Waker>,
}

/// Stores the result of a mapping, unless there is one already, and wakes the waiting task.
fn tell(mapping: &Mutex<Mapping>, result: std::result::Result<(), String>) {
    let waker = {
        let mut mapping = lock(mapping);
        mapping.result.get_or_insert(result);
        mapping.waker.take()
    };
    if let Some(waker) = waker {
        waker.wake();
    }
}

/// The future of one read.
struct Read {
    shared: Arc<Shared>,
    spare: Arc<Spare>,
    buffer: Option<wgpu::Buffer>,
    bytes: u64,
    submission: wgpu::SubmissionIndex,
    mapping: Arc<Mutex<Mapping>>,
    /// Whether a thread drives the device for it.
    driven: bool,
}

/// Encodes and submits commands, the last of which fill the first `bytes` of `buffer`, and requests its mapping. `what` is
/// for the message if the driver rejects a call.
pub(super) fn submit(
    shared: &Arc<Shared>,
    spare: &Arc<Spare>,
    what: &str,
    buffer: wgpu::Buffer,
    bytes: u64,
    encode: impl FnOnce(&wgpu::Buffer) -> wgpu::CommandEncoder,
) -> Result<Ticket<Vec<u32>>> {
    let mapping = Arc::<Mutex<Mapping>>::default();
    let answer = Arc::clone(&mapping);
    let gpu = &shared.gpu;
    let submission = gpu.guarded(what, bytes, || {
        let submission = gpu.queue.submit([encode(&buffer).finish()]);
        if bytes > 0 {
            buffer.map_async(wgpu::MapMode::Read, 0..bytes, move |result| {
                tell(&answer, result.map_err(|error| error.to_string()));
            });
        } else {
            gpu.queue
                .on_submitted_work_done(move || tell(&answer, Ok(())));
        }
        submission
    })?;
    let unsettled = gpu.unsettled();
    let read = Read {
        shared: Arc::clone(shared),
        spare: Arc::clone(spare),
        buffer: Some(buffer),
        bytes,
        submission,
        mapping,
        driven: false,
    };
    Ok(Ticket::new(async move {
        let shared = Arc::clone(&read.shared);
        shared.gpu.settle(unsettled).await?;
        match read.await {
            Err(error) => Err(shared.gpu.cause(error).await),
            words => words,
        }
    }))
}

impl Read {
    fn failed(&self, reason: String) -> BackendError {
        self.shared
            .gpu
            .healthy()
            .err()
            .unwrap_or(BackendError::Driver {
                backend: "wgpu",
                what: "to give back an answer".to_owned(),
                reason,
            })
    }

    /// The words that were read, once they are mapped.
    fn words(&mut self) -> Result<Vec<u32>> {
        self.shared.gpu.call("an answer", self.bytes)?;
        let Some(buffer) = self.buffer.take() else {
            return Ok(Vec::new());
        };
        let mut words = Vec::new();
        if self.bytes > 0 {
            let view = buffer
                .get_mapped_range(0..self.bytes)
                .map_err(|error| self.failed(error.to_string()))?;
            words = bytemuck::pod_collect_to_vec(&view[..]);
            drop(view);
            buffer.unmap();
        }
        self.spare.give(buffer);
        Ok(words)
    }

    /// Lets a thread that awaits this block until the submission is done; that call runs the callback of [`submit`].
    fn drive(&mut self, cx: &Context<'_>) -> Result<()> {
        if std::mem::replace(&mut self.driven, true) {
            return Ok(());
        }
        let (shared, mapping) = (Arc::clone(&self.shared), Arc::clone(&self.mapping));
        let submission_index = Some(self.submission.clone());
        await_device(cx, "wgpu", move || {
            let wait = wgpu::PollType::Wait {
                submission_index,
                timeout: None,
            };
            if let Err(error) = shared.gpu.device.poll(wait) {
                tell(&mapping, Err(error.to_string()));
            }
        })
    }
}

impl Future for Read {
    type Output = Result<Vec<u32>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let result = {
            let mut mapping = lock(&self.mapping);
            if mapping.result.is_none() {
                mapping.waker = Some(cx.waker().clone());
            }
            mapping.result.take()
        };
        match result {
            Some(Ok(())) => return Poll::Ready(self.words()),
            Some(Err(reason)) => return Poll::Ready(Err(self.failed(reason))),
            // A device that was lost may never report the result of a mapping.
            None => self.shared.gpu.healthy()?,
        }
        self.drive(cx)?;
        Poll::Pending
    }
}
