//! Host memory that the device copies from and to while the host goes on, and the event that says when it has.

use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::result;
use cudarc::driver::sys;

use super::{Context, told};
use crate::backend::Result;

/// Pinned memory.
pub(super) struct Pinned {
    context: Arc<Context>,
    at: *mut u8,
    len: usize,
}

// SAFETY: it is owned memory like a boxed slice.
unsafe impl Send for Pinned {}

impl Pinned {
    fn new(context: &Arc<Context>, len: usize) -> Result<Self> {
        // SAFETY: the context is current; the memory is freed in `drop`.
        let at = told("pinned memory", unsafe { result::malloc_host(len, 0) })?.cast::<u8>();
        // SAFETY: it is ours, `len` bytes long, and has not been written.
        unsafe { at.write_bytes(0, len) };
        Ok(Self {
            context: Arc::clone(context),
            at,
            len,
        })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: initialised when made, and the device writes it only before an event that the reader waited for.
        unsafe { std::slice::from_raw_parts(self.at, self.len) }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.len) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: made by `malloc_host`, freed once.
            let _ = unsafe { result::free_host(self.at.cast()) };
        }
    }
}

/// Pinned memory that waits to be used again.
pub(super) struct Spare {
    context: Arc<Context>,
    waiting: Mutex<Vec<Pinned>>,
}

impl Spare {
    pub(super) fn new(context: &Arc<Context>) -> Self {
        Self {
            context: Arc::clone(context),
            waiting: Mutex::default(),
        }
    }

    /// At least `len` bytes.
    pub(super) fn take(&self, len: usize) -> Result<Pinned> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = waiting.iter().position(|pinned| pinned.len >= len) {
            return Ok(waiting.swap_remove(at));
        }
        // One that is too small will not do next time either.
        waiting.pop();
        drop(waiting);
        Pinned::new(&self.context, len.next_power_of_two().max(4096))
    }

    pub(super) fn give(&self, pinned: Pinned) {
        self.waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(pinned);
    }
}

/// A place in the stream.
pub(super) struct Event {
    context: Arc<Context>,
    handle: sys::CUevent,
}

// SAFETY: events may be used from any thread with the context current.
unsafe impl Send for Event {}

impl Event {
    /// The stream's present end.
    pub(super) fn record(context: &Arc<Context>, timed: bool) -> Result<Self> {
        let flags = if timed {
            sys::CUevent_flags::CU_EVENT_DEFAULT
        } else {
            sys::CUevent_flags::CU_EVENT_DISABLE_TIMING
        };
        let event = Self {
            context: Arc::clone(context),
            handle: told("an event", result::event::create(flags))?,
        };
        // SAFETY: both handles live.
        told("an event", unsafe {
            result::event::record(event.handle, context.stream)
        })?;
        Ok(event)
    }

    /// Waits until all before it has run.
    pub(super) fn wait(&self) -> Result<()> {
        self.context.enter()?;
        // SAFETY: the handle lives.
        told("a step", unsafe { result::event::synchronize(self.handle) })
    }

    /// Milliseconds from this one to a later one, both waited for.
    pub(super) fn until(&self, later: &Self) -> Result<f32> {
        // SAFETY: both handles live and were recorded.
        told("an event's time", unsafe {
            result::event::elapsed(self.handle, later.handle)
        })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: made by `record`, destroyed once.
            let _ = unsafe { result::event::destroy(self.handle) };
        }
    }
}
