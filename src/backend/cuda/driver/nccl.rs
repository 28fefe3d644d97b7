//! NCCL: exchanges between GPUs, on the driver's stream.
//!
//! The library is opened here and not by cudarc, which does not look for `libnccl.so.2`, the only name that NVIDIA's packages
//! without headers install. A communicator is used by one thread at a time, behind the lock of [`Ranks`], and it blocks: a call
//! returns when its kernels are on the stream.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;

use cudarc::driver::{CudaStream, DevicePtr};

use super::memory::DeviceMemory;
use super::{driver_call, unavailable};
use crate::backend::cuda::machine::{Collective, Place};
use crate::backend::{CollectiveId, Collectives, Result};
use crate::error::BackendError;

/// Names of the library; the second comes with its headers.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
const MISSING: &str = "NCCL (libnccl.so.2) is not found: results pass through the host's memory, which is slow. Install libnccl2, or put \
                       the folder of PyPI's nvidia-nccl-cu13 on LD_LIBRARY_PATH";

// Numbers of `nccl.h`: results, element types, the operation.
const SUCCESS: c_int = 0;
const INVALID_ARGUMENT: c_int = 4;
const INVALID_USAGE: c_int = 5;
const UINT8: c_int = 1;
const FLOAT32: c_int = 7;
const BFLOAT16: c_int = 9;
const SUM: c_int = 0;

/// Bytes of the first sums and gathers. NCCL connects devices when an algorithm is first used, which waits for all of them, and it
/// chooses algorithms by size: later calls must not wait, since a rank that failed does not come.
const FIRST_BYTES: [usize; 4] = [1 << 10, 1 << 16, 1 << 20, 1 << 24];

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([u8; 128]);

/// `ncclComm_t`.
type Handle = *mut c_void;

/// The functions that are called, as `nccl.h` declares them.
struct Library {
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    comm_init_rank: unsafe extern "C" fn(*mut Handle, c_int, UniqueId, c_int) -> c_int,
    comm_abort: unsafe extern "C" fn(Handle) -> c_int,
    all_reduce: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        c_int,
        c_int,
        Handle,
        *mut c_void,
    ) -> c_int,
    all_gather: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        c_int,
        Handle,
        *mut c_void,
    ) -> c_int,
    group_start: unsafe extern "C" fn() -> c_int,
    group_end: unsafe extern "C" fn() -> c_int,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    /// Never closed.
    _opened: libloading::Library,
}

impl Library {
    /// The library, if it is found.
    fn get() -> Option<&'static Self> {
        static OPENED: OnceLock<Option<Library>> = OnceLock::new();
        OPENED
            .get_or_init(|| NAMES.into_iter().find_map(Self::open))
            .as_ref()
    }

    fn open(name: &str) -> Option<Self> {
        // SAFETY: NCCL may be opened on any thread, and the types of its functions are those of `nccl.h`, which have not changed
        // since version 2.10. The pointers live as long as the library, which is never closed.
        unsafe {
            let opened = libloading::Library::new(name).ok()?;
            Some(Self {
                get_unique_id: *opened.get(b"ncclGetUniqueId\0").ok()?,
                comm_init_rank: *opened.get(b"ncclCommInitRank\0").ok()?,
                comm_abort: *opened.get(b"ncclCommAbort\0").ok()?,
                all_reduce: *opened.get(b"ncclAllReduce\0").ok()?,
                all_gather: *opened.get(b"ncclAllGather\0").ok()?,
                group_start: *opened.get(b"ncclGroupStart\0").ok()?,
                group_end: *opened.get(b"ncclGroupEnd\0").ok()?,
                error_string: *opened.get(b"ncclGetErrorString\0").ok()?,
                _opened: opened,
            })
        }
    }

    /// The result of a call.
    fn said(&self, what: &str, code: c_int) -> Result<()> {
        if code == SUCCESS {
            return Ok(());
        }
        // SAFETY: the function returns null or a text that is never freed, for any number.
        let text = unsafe {
            let text = (self.error_string)(code);
            (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy())
        };
        let text = text.unwrap_or_default();
        let reason = format!("NCCL returned {code}, {text}");
        Err(match code {
            INVALID_ARGUMENT | INVALID_USAGE => BackendError::Driver {
                backend: "cuda",
                what: what.to_owned(),
                reason,
            },
            // Whether the other devices have run it is not known.
            _ => BackendError::Lost {
                backend: "cuda",
                reason: format!("{what}: {reason}"),
            },
        })
    }
}

/// Whether devices may exchange results by themselves: yes, unless `KIMI_LINEAR_NCCL` is `0`.
fn wanted() -> bool {
    std::env::var_os("KIMI_LINEAR_NCCL").is_none_or(|value| value != "0")
}

pub(super) fn collectives() -> Collectives {
    match Library::get() {
        _ if !wanted() => Collectives::Never,
        Some(_) => Collectives::Ready,
        None => Collectives::Missing(MISSING.to_owned()),
    }
}

pub(super) fn collective_id() -> Result<CollectiveId> {
    let library = Library::get().ok_or_else(|| unavailable(MISSING))?;
    let mut id = UniqueId([0; 128]);
    // SAFETY: it writes one id.
    let made = unsafe { (library.get_unique_id)(&raw mut id) };
    library.said("an id for its ranks", made)?;
    let mut parts = [[0; 32]; 4];
    parts.as_flattened_mut().copy_from_slice(&id.0);
    Ok(CollectiveId(parts))
}

/// This GPU's part in a communicator.
struct Communicator {
    library: &'static Library,
    handle: Handle,
    stream: Arc<CudaStream>,
}

// SAFETY: a communicator may be used on any thread, one at a time; it is behind a lock.
unsafe impl Send for Communicator {}

impl Communicator {
    /// Joins as number `rank` of `ranks`; waits for all. The context is current.
    fn new(stream: &Arc<CudaStream>, id: CollectiveId, [rank, ranks]: [usize; 2]) -> Result<Self> {
        let library = Library::get().ok_or_else(|| unavailable(MISSING))?;
        let mut bytes = UniqueId([0; 128]);
        bytes.0.copy_from_slice(id.0.as_flattened());
        let (mut handle, number) = (std::ptr::null_mut(), |count: usize| count as c_int);
        // SAFETY: it writes one handle; the id is passed by value.
        let made = unsafe {
            (library.comm_init_rank)(&raw mut handle, number(ranks), bytes, number(rank))
        };
        library.said("to join the other devices", made)?;
        let joined = Self {
            library,
            handle,
            stream: Arc::clone(stream),
        };
        joined.connect(ranks)?;
        Ok(joined)
    }

    /// Runs the first sums and gathers.
    fn connect(&self, ranks: usize) -> Result<()> {
        let most = FIRST_BYTES.into_iter().max().unwrap_or_default();
        let what = "memory for the first exchange";
        let from = driver_call(what, self.stream.alloc_zeros::<u8>(most))?;
        let to = driver_call(what, self.stream.alloc_zeros::<u8>(most))?;
        let [from, to] = [&from, &to].map(|slice| slice.device_ptr(&self.stream).0);
        for bytes in FIRST_BYTES {
            for (element, size) in [(BFLOAT16, 2), (FLOAT32, 4)] {
                // SAFETY: `to` has that many bytes, and is freed on this stream, after the call.
                unsafe { self.sum(to, bytes / size, element)? };
            }
            // SAFETY: as above, of both.
            unsafe { self.gather(from, to, bytes / ranks)? };
        }
        driver_call("the first exchange", self.stream.synchronize())
    }

    /// # Safety
    /// `target` is device memory of `count` elements that is not freed before the sum is done.
    unsafe fn sum(&self, target: u64, count: usize, element: c_int) -> Result<()> {
        let stream = self.stream.cu_stream().cast();
        // SAFETY: the caller's promise; handle and stream live.
        let said = unsafe {
            (self.library.all_reduce)(
                target as *const c_void,
                target as *mut c_void,
                count,
                element,
                SUM,
                self.handle,
                stream,
            )
        };
        self.library.said("a sum over devices", said)
    }

    /// # Safety
    /// `from` is device memory of `bytes` bytes, `to` of as many for each rank, and neither is freed before the gather is done.
    unsafe fn gather(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        let stream = self.stream.cu_stream().cast();
        // SAFETY: the caller's promise; handle and stream live.
        let said = unsafe {
            (self.library.all_gather)(
                from as *const c_void,
                to as *mut c_void,
                bytes,
                UINT8,
                self.handle,
                stream,
            )
        };
        self.library.said("a gather from devices", said)
    }

    fn run(&self, collective: &Collective) -> Result<()> {
        let address = |place: &Place| {
            let memory = DeviceMemory::of(&self.stream, place.buffer())?;
            Ok(memory.address() + place.range().start as u64)
        };
        match collective {
            Collective::Sum { target, full } => {
                let (element, size) = if *full { (FLOAT32, 4) } else { (BFLOAT16, 2) };
                // SAFETY: the range is within its buffer, which is freed on this stream, after the sum.
                unsafe { self.sum(address(target)?, target.range().len() / size, element) }
            }
            Collective::Gather { from, to, rows } => {
                let each = |place: &Place| place.range().len() / (*rows).max(1);
                let (part, whole) = (each(from), each(to));
                let (from, to) = (address(from)?, address(to)?);
                // One kernel for all rows: each is gathered to its place.
                // SAFETY: the function has no arguments, and the group is ended on the same thread.
                let started = unsafe { (self.library.group_start)() };
                self.library.said("a gather from devices", started)?;
                let rows = (0..*rows as u64).try_for_each(|row| {
                    let (from, to) = (from + row * part as u64, to + row * whole as u64);
                    // SAFETY: both rows are within their buffers, which are freed on this stream, after the gather; an output
                    // row has a part of each rank, as was checked when the program was compiled.
                    unsafe { self.gather(from, to, part) }
                });
                // SAFETY: as above.
                let ended = unsafe { (self.library.group_end)() };
                rows?;
                self.library.said("a gather from devices", ended)
            }
        }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        struct Last(Handle, Arc<CudaStream>);
        // SAFETY: the communicator's only user from here on is the thread.
        unsafe impl Send for Last {}
        let (last, abort) = (
            Last(self.handle, Arc::clone(&self.stream)),
            self.library.comm_abort,
        );
        // On a thread of its own, because it waits for the other ranks of this process and for graphs that have its kernels; the
        // kernels that wait for other devices end at once. If no thread starts, the communicator is never freed.
        let started = thread::Builder::new().spawn(move || {
            // The whole of it is moved here, not its handle alone.
            let last = last;
            let Last(handle, stream) = last;
            if stream.context().bind_to_thread().is_ok() {
                // SAFETY: the handle is used for the last time; the stream lives until the call returns.
                unsafe { abort(handle) };
            }
        });
        drop(started);
    }
}

/// The GPUs that this one exchanges results with.
enum Membership {
    None,
    Joined(Communicator),
    Left,
}

/// The same, for the driver and for what it enqueues.
pub(super) struct Ranks(Mutex<Membership>);

impl Ranks {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Membership::None))
    }

    fn lock(&self) -> MutexGuard<'_, Membership> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Joins the other GPUs; waits for all. The context is current.
    pub(super) fn join(
        &self,
        stream: &Arc<CudaStream>,
        id: CollectiveId,
        place: [usize; 2],
    ) -> Result<()> {
        *self.lock() = Membership::Joined(Communicator::new(stream, id, place)?);
        Ok(())
    }

    /// Leaves the other GPUs, if it has joined any, as soon as no thread enqueues commands.
    pub(super) fn leave(&self) {
        let mut ranks = self.lock();
        if matches!(*ranks, Membership::Joined(_)) {
            *ranks = Membership::Left;
        }
    }

    /// Enqueues an exchange.
    pub(super) fn run(&self, collective: &Collective) -> Result<()> {
        match &*self.lock() {
            Membership::Joined(communicator) => communicator.run(collective),
            Membership::None | Membership::Left => Err(left()),
        }
    }

    /// Calls `enqueue` while the communicator that a graph's kernels use lives.
    pub(super) fn held(&self, enqueue: impl FnOnce() -> Result<()>) -> Result<()> {
        match &*self.lock() {
            Membership::Left => Err(left()),
            Membership::None | Membership::Joined(_) => enqueue(),
        }
    }
}

fn left() -> BackendError {
    BackendError::Lost {
        backend: "cuda",
        reason: "it has left the devices that it exchanged results with, since one of them failed"
            .to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nccl_gives_ids_or_says_what_to_install() {
        match collectives() {
            Collectives::Missing(reason) => {
                assert!(reason.contains("nvidia-nccl-cu13"), "{reason}");
                let error = collective_id().map(drop);
                assert!(matches!(error, Err(BackendError::Unavailable { .. })));
            }
            // An id needs no GPU.
            Collectives::Ready => assert_ne!(collective_id().unwrap(), collective_id().unwrap()),
            Collectives::Never => assert!(!wanted()),
        }
    }

    #[test]
    fn what_has_joined_nothing_runs_nothing_and_holds_nothing_up() {
        let ranks = Ranks::new();
        ranks.leave();
        assert_eq!(ranks.held(|| Ok(())), Ok(()));
    }
}
