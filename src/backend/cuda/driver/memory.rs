//! Device memory: cudarc's slices, used and freed in the order of one stream.

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

/// Slices that are no longer used. Freeing memory is a command on the stream, which would become part of a capture: slices
/// are collected here until nothing is being captured.
#[derive(Clone, Default)]
pub(super) struct Freed(Arc<Mutex<Vec<Slice>>>);

impl Freed {
    /// Frees all collected slices. The context is current and nothing is being captured.
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
    /// Allocates memory. Nothing is being captured.
    pub(super) fn new(
        stream: &Arc<CudaStream>,
        freed: &Freed,
        what: &str,
        bytes: u64,
    ) -> Result<Self> {
        use cudarc::driver::DevicePtr;

        // Zeroed, as cudarc's safe call does: each byte is written once, by the device.
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

    /// The memory of a buffer, if it belongs to this stream.
    pub(super) fn of<'a>(stream: &Arc<CudaStream>, buffer: &'a Buffer) -> Result<&'a Self> {
        let memory = buffer.memory::<Self>();
        memory
            .filter(|memory| Arc::ptr_eq(&memory.stream, stream))
            .ok_or_else(foreign)
    }

    /// Its address, for a kernel.
    pub(super) fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        lock(&self.freed.0).push(Arc::clone(&self.slice));
    }
}

/// Enqueues a copy to the device. Pinned `bytes` must not be freed before it is done.
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

/// Enqueues a copy to the host. `bytes` have the same length, are pinned, and must not be freed before it is done.
pub(super) fn read(stream: &Arc<CudaStream>, place: &Place, bytes: &mut [u8]) -> Result<()> {
    let slice = lock(&DeviceMemory::of(stream, place.buffer())?.slice);
    let from = slice.try_slice(place.range()).ok_or_else(foreign)?;
    driver_call("a copy to the host", stream.memcpy_dtoh(&from, bytes))
}

/// Enqueues a copy on the device.
pub(super) fn copy(stream: &Arc<CudaStream>, from: &Place, to: &Place) -> Result<()> {
    let [source, target] = [from, to].map(|place| DeviceMemory::of(stream, place.buffer()));
    let (source, target) = (source?, target?);
    if Arc::ptr_eq(from.buffer(), to.buffer()) || from.range().len() != to.range().len() {
        return Err(BackendError::Shape {
            operation: "device memory",
            what: "a copy",
            expected: "two buffers, and the same number of bytes of each".to_owned(),
            found: format!("{:?} and {:?}", from.range(), to.range()),
        });
    }
    let (source, mut target) = (lock(&source.slice), lock(&target.slice));
    let source = source.try_slice(from.range()).ok_or_else(foreign)?;
    let mut target = target.try_slice_mut(to.range()).ok_or_else(foreign)?;
    driver_call("a copy", stream.memcpy_dtod(&source, &mut target))
}
