//! The way back from the device: copies into a buffer that the host may map, and the ticket that waits for it.
//!
//! Natively the ticket drives the device when it is polled; in a browser the event loop would, and the ticket only waits.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use super::Shared;
use crate::backend::Result;
use crate::error::BackendError;

/// Buffers that wait to be used again.
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
        // One that is too small will not do next time either.
        spare.pop();
        drop(spare);
        let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        shared.gpu.buffer_for("answers of a step", bytes, usage)
    }

    fn give(&self, buffer: wgpu::Buffer) {
        lock(&self.0).push(buffer);
    }
}

/// What the mapping came to, and who waits for it.
#[derive(Default)]
struct Mapping {
    result: Option<std::result::Result<(), wgpu::BufferAsyncError>>,
    waker: Option<Waker>,
}

/// The future of one read.
pub(super) struct Read {
    shared: Arc<Shared>,
    spare: Arc<Spare>,
    buffer: Option<wgpu::Buffer>,
    bytes: u64,
    submission: wgpu::SubmissionIndex,
    mapping: Arc<Mutex<Mapping>>,
}

impl Read {
    /// Submits `encoder`, whose last commands fill the first `bytes` of `buffer`, and asks for them.
    pub(super) fn submit(
        shared: &Arc<Shared>,
        spare: &Arc<Spare>,
        encoder: wgpu::CommandEncoder,
        buffer: wgpu::Buffer,
        bytes: u64,
    ) -> Result<Self> {
        let mapping = Arc::<Mutex<Mapping>>::default();
        let answer = Arc::clone(&mapping);
        let submission = shared.gpu.guarded("a submission", 0, || {
            let submission = shared.gpu.queue.submit([encoder.finish()]);
            if bytes > 0 {
                buffer.map_async(wgpu::MapMode::Read, 0..bytes, move |result| {
                    let waker = {
                        let mut mapping = lock(&answer);
                        mapping.result = Some(result);
                        mapping.waker.take()
                    };
                    if let Some(waker) = waker {
                        waker.wake();
                    }
                });
            }
            submission
        })?;
        Ok(Self {
            shared: Arc::clone(shared),
            spare: Arc::clone(spare),
            buffer: Some(buffer),
            bytes,
            submission,
            mapping,
        })
    }

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

    /// The answer's words, once they are mapped.
    fn words(&mut self) -> Result<Vec<u32>> {
        self.shared.gpu.healthy()?;
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
}

impl Future for Read {
    type Output = Result<Vec<u32>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        // Before the waker is stored, so that a natively blocking wait needs no second turn.
        let wait = wgpu::PollType::Wait {
            submission_index: Some(self.submission.clone()),
            timeout: None,
        };
        if let Err(error) = self.shared.gpu.device.poll(wait) {
            return Poll::Ready(Err(self.failed(error.to_string())));
        }
        let result = {
            let mut mapping = lock(&self.mapping);
            if self.bytes > 0 && mapping.result.is_none() {
                mapping.waker = Some(cx.waker().clone());
                return Poll::Pending;
            }
            mapping.result.take()
        };
        Poll::Ready(match result {
            Some(Err(error)) => Err(self.failed(error.to_string())),
            _ => self.words(),
        })
    }
}
