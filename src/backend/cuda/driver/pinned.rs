//! Host memory that the device copies from and to while the host goes on.

use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaContext, result};

use super::driver_call;
use crate::backend::Result;

/// Buffers that wait at most: a few of each size that steps of one server ask for.
const MOST: usize = 16;

/// Pinned memory.
pub(super) struct Pinned {
    context: Arc<CudaContext>,
    at: *mut u8,
    len: usize,
}

// SAFETY: it is owned memory like a boxed slice.
unsafe impl Send for Pinned {}

impl Pinned {
    fn new(context: &Arc<CudaContext>, len: usize) -> Result<Self> {
        driver_call("its context", context.bind_to_thread())?;
        // SAFETY: the context is current; the memory is freed in `drop`.
        let at = driver_call("pinned memory", unsafe { result::malloc_host(len, 0) })?.cast::<u8>();
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
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: made by `malloc_host`, freed once.
            let _ = unsafe { result::free_host(self.at.cast()) };
        }
    }
}

/// Pinned memory that waits to be used again.
pub(super) struct Spare {
    context: Arc<CudaContext>,
    waiting: Mutex<Vec<Pinned>>,
}

impl Spare {
    pub(super) fn new(context: &Arc<CudaContext>) -> Self {
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
        // Taking and giving back pinned memory both wait for the device: what is too small for this may do for another.
        let smallest = (0..waiting.len()).min_by_key(|at| waiting[*at].len);
        let dropped = smallest
            .filter(|_| waiting.len() >= MOST)
            .map(|at| waiting.swap_remove(at));
        drop(waiting);
        drop(dropped);
        Pinned::new(&self.context, len.next_power_of_two().max(4096))
    }

    pub(super) fn give(&self, pinned: Pinned) {
        self.waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(pinned);
    }
}
