//! A machine whose n-th call fails: allocations, writes, submissions and results of submissions are counted.
#![allow(unreachable_pub, missing_docs)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kimi_linear::backend::cuda::machine::{Answers, Buffer, Machine, Memory, Work};
use kimi_linear::backend::wgpu::{Fault, Faults};
use kimi_linear::backend::{CollectiveId, Collectives, Device, Result, Ticket};
use kimi_linear::error::BackendError;

pub struct FaultyMachine {
    inner: Arc<dyn Machine>,
    calls: Calls,
}

/// Number of calls so far, and whether the device is lost.
#[derive(Clone)]
struct Calls {
    faults: Arc<Faults>,
    lost: Arc<AtomicBool>,
}

impl Calls {
    /// Counts a call; returns its error, if it has one.
    fn call(&self, what: &str, bytes: u64) -> Result<()> {
        let fault = self.faults.call();
        if fault == Some(Fault::Lost) {
            self.lost.store(true, Ordering::Relaxed);
        }
        if self.lost.load(Ordering::Relaxed) {
            return Err(BackendError::Lost {
                backend: "cuda-emulated",
                reason: "a test injected this loss".to_owned(),
            });
        }
        fault.map_or(Ok(()), |fault| {
            Err(fault.error("cuda-emulated", what, bytes))
        })
    }
}

impl FaultyMachine {
    pub fn new(inner: Arc<dyn Machine>, faults: &Arc<Faults>) -> Self {
        let calls = Calls {
            faults: Arc::clone(faults),
            lost: Arc::default(),
        };
        Self { inner, calls }
    }
}

impl Machine for FaultyMachine {
    fn device(&self) -> &Device {
        self.inner.device()
    }

    fn allocate(&self, what: &str, bytes: u64) -> Result<Box<dyn Memory>> {
        self.calls.call(what, bytes)?;
        self.inner.allocate(what, bytes)
    }

    fn write(&self, buffer: &Buffer, start: u64, bytes: &[u8]) -> Result<()> {
        self.calls
            .call("a copy to the device", bytes.len() as u64)?;
        self.inner.write(buffer, start, bytes)
    }

    fn submit(&self, work: &Work<'_>) -> Result<Ticket<Answers>> {
        self.calls.call("a step", 0)?;
        let (ticket, calls) = (self.inner.submit(work)?, self.calls.clone());
        Ok(Ticket::new(async move {
            calls.call("an answer", 0)?;
            ticket.await
        }))
    }

    fn forget(&self, step: u64) {
        self.inner.forget(step);
    }

    fn collectives(&self) -> Collectives {
        self.inner.collectives()
    }

    fn collective_id(&self) -> Result<CollectiveId> {
        self.inner.collective_id()
    }

    fn join(&self, id: CollectiveId, rank: usize, ranks: usize) -> Result<()> {
        self.inner.join(id, rank, ranks)
    }

    fn leave(&self) {
        self.inner.leave();
    }
}
