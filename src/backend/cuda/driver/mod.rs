//! NVIDIA's driver as a [`Machine`]: one context and one stream of one GPU.
//!
//! The libraries are opened at run time; what is missing is told in a sentence. All of the `unsafe` that CUDA's C
//! interfaces ask for is in this folder. What makes it sound: the context is made current before each call; handles live
//! in [`Driver`] or are owned by one value that destroys them; everything runs in the order of one stream; memory that
//! the device reads or writes is either the device's own or pinned and kept until an event says that it is done with.
//! Contexts, streams, events and graphs are cudarc's.
#![allow(unsafe_code)]

pub mod compile;
mod graphs;
mod loader;
mod modules;
mod pinned;
mod product;
mod run;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};
use cudarc::driver::{CudaContext, CudaStream};

pub use self::loader::Found;
use self::loader::Loader;
use self::pinned::{Pinned, Spare};
use self::run::State;
use super::machine::{Answers, Machine, Work};
use crate::backend::{Device, Precision, Result, Ticket};
use crate::config::Dtype;
use crate::error::BackendError;

/// The least compute capability: the copy engine, its barriers, and blocks with 227 KiB of shared memory.
const LEAST: (i32, i32) = (9, 0);
/// The least driver, in the driver's own count: CUDA 12.8 has all that is called here. It is enough where NVRTC of its own
/// version compiles the kernels; those that come with the program are of CUDA 13.0, which `modules` says when one is
/// refused.
const LEAST_DRIVER: i32 = 12_080;

/// A call of the driver as one of ours.
pub(super) fn driver_call<T>(what: &str, result: std::result::Result<T, DriverError>) -> Result<T> {
    result.map_err(|error| {
        let reason = reason(error);
        match error.0 {
            // After these a context does nothing any more.
            sys::CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
            | sys::CUresult::CUDA_ERROR_LAUNCH_FAILED
            | sys::CUresult::CUDA_ERROR_LAUNCH_TIMEOUT
            | sys::CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
            | sys::CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | sys::CUresult::CUDA_ERROR_ASSERT
            | sys::CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR
            | sys::CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | sys::CUresult::CUDA_ERROR_INVALID_PC
            | sys::CUresult::CUDA_ERROR_NVLINK_UNCORRECTABLE
            | sys::CUresult::CUDA_ERROR_ECC_UNCORRECTABLE => BackendError::Lost {
                backend: "cuda",
                reason: format!("{what}: {reason}"),
            },
            _ => BackendError::Driver {
                backend: "cuda",
                what: what.to_owned(),
                reason,
            },
        }
    })
}

/// What the driver says of an error.
fn reason(error: DriverError) -> String {
    error.error_string().map_or_else(
        |_| format!("{:?}", error.0),
        |text| text.to_string_lossy().into_owned(),
    )
}

fn unavailable(reason: impl Into<String>) -> BackendError {
    BackendError::Unavailable {
        backend: "cuda",
        reason: reason.into(),
    }
}

/// How many devices the driver has.
fn count() -> Result<usize> {
    // SAFETY: it only tries to open a library.
    if !unsafe { sys::is_culib_present() } {
        return Err(unavailable(
            "there is no NVIDIA driver on this machine (libcuda is not found); --backend auto takes what there is",
        ));
    }
    result::init().map_err(|error| {
        unavailable(format!(
            "the NVIDIA driver does not start ({}); --backend auto takes what there is",
            reason(error)
        ))
    })?;
    let count = driver_call("its number of devices", result::device::get_count())?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// Every device that the driver has, in its order; none where there is no driver.
#[must_use]
pub fn devices() -> Vec<Device> {
    let count = count().unwrap_or_else(|error| {
        // SAFETY: it only tries to open a library.
        if unsafe { sys::is_culib_present() } {
            // There is a driver and it does not do: whoever wonders why no GPU is used should read of it.
            tracing::warn!("{error}");
        }
        0
    });
    (0..count)
        .filter_map(|index| describe(index).ok())
        .map(|(device, _)| device)
        .collect()
}

/// Where the kernels of device `index` come from. Nothing is loaded or compiled.
///
/// # Errors
/// No such device, or one that cannot be used, and why.
pub fn kernels_of(index: usize) -> Result<Found> {
    count()?;
    let (device, capability) = describe(index)?;
    let driver = usable(&device, capability)?;
    Ok(Loader::new(capability, driver).found())
}

/// A device and its compute capability.
fn describe(index: usize) -> Result<(Device, (i32, i32))> {
    let ordinal = i32::try_from(index).unwrap_or(i32::MAX);
    let handle = driver_call("a device", result::device::get(ordinal))?;
    let name = driver_call("a device's name", result::device::get_name(handle))?;
    // SAFETY: the handle is the driver's own.
    let (bytes, major, minor) = unsafe {
        (
            driver_call("a device's memory", result::device::total_mem(handle))?,
            driver_call(
                "a device's compute capability",
                result::device::get_attribute(
                    handle,
                    Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                ),
            )?,
            driver_call(
                "a device's compute capability",
                result::device::get_attribute(
                    handle,
                    Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                ),
            )?,
        )
    };
    let device = Device {
        backend: "cuda",
        index,
        name,
        memory_bytes: Some(bytes as u64),
        precision: Precision::Bf16,
        cache: Dtype::Bf16,
    };
    Ok((device, (major, minor)))
}

/// A version of CUDA in the driver's own count, in words.
fn cuda_version(count: i32) -> String {
    format!("{}.{}", count / 1000, count % 1000 / 10)
}

/// The driver's version in its own count, if it and a device of this compute capability will do.
fn usable(device: &Device, capability: (i32, i32)) -> Result<i32> {
    if capability < LEAST {
        return Err(unavailable(format!(
            "{} has compute capability {}.{}, and the kernels need {}.{} or newer; --backend wgpu may drive it",
            device.name, capability.0, capability.1, LEAST.0, LEAST.1
        )));
    }
    let mut version = 0;
    // SAFETY: it writes one integer.
    driver_call("its version", unsafe {
        sys::cuDriverGetVersion(&raw mut version).result()
    })?;
    if version < LEAST_DRIVER {
        let [found, least] = [version, LEAST_DRIVER].map(cuda_version);
        return Err(unavailable(format!(
            "the NVIDIA driver knows CUDA {found}, and {least} (driver 570) or newer is needed, 13.0 (driver 580) for the \
             kernels that come with the program: install a newer driver, or take --backend wgpu"
        )));
    }
    Ok(version)
}

/// One GPU.
pub struct Driver {
    device: Device,
    // Before the stream: modules, graphs and pinned memory are of its context.
    state: Mutex<State>,
    spare: Arc<Spare>,
    stream: Arc<CudaStream>,
}

impl Driver {
    /// Opens device `index` of the driver, by default the first.
    ///
    /// # Errors
    /// No driver, no such device, one too old, no NVRTC or no cuBLASLt.
    pub fn open(index: Option<usize>) -> Result<Self> {
        let count = count()?;
        let index = index.unwrap_or(0);
        if index >= count {
            if count == 0 {
                return Err(unavailable(
                    "the NVIDIA driver finds no GPU; --backend auto takes what there is",
                ));
            }
            return Err(BackendError::NoSuchDevice {
                backend: "cuda",
                index,
                available: format!("{count}, numbered from 0"),
            });
        }
        let (device, capability) = describe(index)?;
        let version = usable(&device, capability)?;
        let context = driver_call("a context", CudaContext::new(index))?;
        let stream = driver_call("a stream", context.new_stream())?;
        let state = State::new(&stream, capability, version)?;
        Ok(Self {
            device,
            state: Mutex::new(state),
            spare: Arc::new(Spare::new(&context)),
            stream,
        })
    }

    /// Makes the device's context this thread's.
    fn enter(&self) -> Result<()> {
        driver_call("its context", self.stream.context().bind_to_thread())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // What a panic left is at worst a graph less.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // What the fields give back is of this context, and may still be used by what was submitted. A context that is gone
        // has taken them along.
        let _ = self.stream.synchronize();
    }
}

impl Machine for Driver {
    fn device(&self) -> &Device {
        &self.device
    }

    fn allocate(&self, what: &str, bytes: u64) -> Result<u64> {
        self.enter()?;
        // SAFETY: what is allocated here is freed by `free` alone.
        let allocated = unsafe { result::malloc_sync(bytes as usize) };
        match allocated {
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                Err(BackendError::OutOfMemory {
                    what: what.to_owned(),
                    bytes,
                })
            }
            other => driver_call(what, other),
        }
    }

    fn free(&self, address: u64, _bytes: u64) {
        if self.enter().is_ok() {
            // SAFETY: the address is of `allocate`; the call waits for what may still use it.
            let _ = unsafe { result::free_sync(address) };
        }
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.enter()?;
        // No capture may be under way: the copy would be encoded, not made.
        let _state = self.state();
        // SAFETY: the owner of the memory vouches for its size; the bytes live until the copy is done.
        driver_call("a copy to the device", unsafe {
            result::memcpy_htod_async(address, bytes, self.stream.cu_stream())
                .and_then(|()| self.stream.synchronize())
        })
    }

    fn submit(&self, work: &Work<'_>) -> Result<Ticket<Answers>> {
        self.enter()?;
        let pending = self.state().submit(&self.spare, work)?;
        Ok(Ticket::new(pending))
    }

    fn forget(&self, step: u64) {
        if self.enter().is_ok() {
            self.state().forget(step);
        }
    }
}
