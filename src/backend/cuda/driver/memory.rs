//! Device memory: slices of cudarc's, used and given back in the order of one stream.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::{CudaSlice, CudaStream};

use super::{BackendError, DriverError, driver_call, sys};
use crate::backend::Result;
use crate::backend::cuda::machine::{Buffer, Memory, Place, foreign};

/// A slice with one user at a time on the host; on the device the stream orders its uses.
type Slice = Arc<Mutex<CudaSlice<u8>>>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Slices that nobody needs any more. Giving memory back is a command on the stream, which a capture would take for one of
/// its own: they wait here until the stream's user is sure that there is none.
#[derive(Clone, Default)]
pub(super) struct Freed(Arc<Mutex<Vec<Slice>>>);

impl Freed {
    /// Gives back all that waits. The context is current and nothing is being captured.
    pub(super) fn give_back(&self) {
        lock(&self.0).clear();
    }
}

/// Memory of one device.
pub(super) struct DeviceMemory {
    slice: Slice,
    address: u64,
    stream: Arc<CudaStream>,
    freed: Freed,
}

impl Memory for DeviceMemory {}

impl DeviceMemory {
    /// Takes memory. Nothing is being captured.
    pub(super) fn new(
        stream: &Arc<CudaStream>,
        freed: &Freed,
        what: &str,
        bytes: u64,
    ) -> Result<Self> {
        use cudarc::driver::DevicePtr;

        // Zeroed, as cudarc's safe call does it: each byte is written once, by the device.
        let slice = match stream.alloc_zeros::<u8>(bytes as usize) {
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                return Err(BackendError::OutOfMemory {
                    what: what.to_owned(),
                    bytes,
                });
            }
            made => driver_call(what, made)?,
        };
        let address = slice.device_ptr(stream).0;
        Ok(Self {
            slice: Arc::new(Mutex::new(slice)),
            address,
            stream: Arc::clone(stream),
            freed: freed.clone(),
        })
    }

    /// That of a buffer, if it is of this stream.
    pub(super) fn of<'a>(stream: &Arc<CudaStream>, buffer: &'a Buffer) -> Result<&'a Self> {
        let memory = buffer.memory::<Self>();
        memory
            .filter(|memory| Arc::ptr_eq(&memory.stream, stream))
            .ok_or_else(foreign)
    }

    /// Where it begins, for a kernel.
    pub(super) fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        lock(&self.freed.0).push(Arc::clone(&self.slice));
    }
}

/// Puts a copy to the device on the stream. Where `bytes` are pinned they must stay until it is done.
pub(super) fn write(
    stream: &Arc<CudaStream>,
    buffer: &Buffer,
    start: u64,
    bytes: &[u8],
) -> Result<()> {
    let range = buffer.range(start, bytes.len() as u64)?;
    let mut slice = lock(&DeviceMemory::of(stream, buffer)?.slice);
    let mut to = slice.try_slice_mut(range).ok_or_else(foreign)?;
    driver_call("a copy to the device", stream.memcpy_htod(bytes, &mut to))
}

/// Puts a copy to the host on the stream. `bytes` are as many, pinned, and must stay until it is done.
pub(super) fn read(stream: &Arc<CudaStream>, place: &Place, bytes: &mut [u8]) -> Result<()> {
    let slice = lock(&DeviceMemory::of(stream, place.buffer())?.slice);
    let from = slice.try_slice(place.range()).ok_or_else(foreign)?;
    driver_call("a copy to the host", stream.memcpy_dtoh(&from, bytes))
}

/// Puts a copy within the device on the stream.
pub(super) fn copy(stream: &Arc<CudaStream>, from: &Place, to: &Place) -> Result<()> {
    let [source, target] = [from, to].map(|place| DeviceMemory::of(stream, place.buffer()));
    let (source, target) = (source?, target?);
    if Arc::ptr_eq(from.buffer(), to.buffer()) || from.range().len() != to.range().len() {
        return Err(BackendError::Shape {
            operation: "device memory",
            what: "a copy",
            expected: "two buffers, and as many bytes of each".to_owned(),
            found: format!("{:?} and {:?}", from.range(), to.range()),
        });
    }
    let (source, mut target) = (lock(&source.slice), lock(&target.slice));
    let source = source.try_slice(from.range()).ok_or_else(foreign)?;
    let mut target = target.try_slice_mut(to.range()).ok_or_else(foreign)?;
    driver_call("a copy", stream.memcpy_dtod(&source, &mut target))
}
