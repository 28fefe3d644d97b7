//! Pinned host memory, which the device copies asynchronously.

use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaContext, CudaEvent, PinnedHostSlice};

use super::driver_call;
use crate::backend::Result;

/// Maximum number of free buffers: a few of each size that the steps of a server use.
const MOST: usize = 16;

/// Pinned memory.
pub(super) type Pinned = PinnedHostSlice<u8>;

fn pinned(context: &Arc<CudaContext>, len: usize) -> Result<Pinned> {
    // Not write-combined, which is cudarc's default, because results are read from it.
    // SAFETY: the caller must write it before it is read, which the next lines do.
    let made = unsafe { context.alloc_pinned_with_flags(len, 0) };
    let mut pinned = driver_call("pinned memory", made)?;
    driver_call("pinned memory", pinned.as_mut_slice())?.fill(0);
    Ok(pinned)
}

/// Pinned memory of a submission that was dropped, and the event after its last use by the device.
struct Waiting {
    pinned: Pinned,
    after: Option<Arc<CudaEvent>>,
}

impl Waiting {
    /// Whether the device has finished with it, or is lost.
    fn is_free(&self) -> bool {
        let after = self.after.as_ref();
        after.is_none_or(|event| !matches!(event.try_is_complete(), Ok(false)))
    }
}

/// Pinned memory that can be used again.
pub(super) struct Spare {
    context: Arc<CudaContext>,
    waiting: Mutex<Vec<Waiting>>,
}

impl Spare {
    pub(super) fn new(context: &Arc<CudaContext>) -> Self {
        Self {
            context: Arc::clone(context),
            waiting: Mutex::default(),
        }
    }

    /// At least `len` bytes. The context is current.
    pub(super) fn take(&self, len: usize) -> Result<Pinned> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |one: &Waiting| one.pinned.len() >= len && one.is_free();
        if let Some(at) = waiting.iter().position(fits) {
            return Ok(waiting.swap_remove(at).pinned);
        }
        // Allocating and freeing pinned memory both wait for the device: a buffer that is too small here is kept for other
        // uses.
        let free = (0..waiting.len()).filter(|at| waiting[*at].is_free());
        let dropped = free
            .min_by_key(|at| waiting[*at].pinned.len())
            .filter(|_| waiting.len() >= MOST)
            .map(|at| waiting.swap_remove(at));
        drop(waiting);
        drop(dropped);
        pinned(&self.context, len.next_power_of_two().max(4096))
    }

    /// Returns memory, which the device may use until `after`.
    pub(super) fn give(&self, pinned: Pinned, after: Option<&Arc<CudaEvent>>) {
        let after = after.map(Arc::clone);
        self.waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Waiting { pinned, after });
    }
}
