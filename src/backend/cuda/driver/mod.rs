//! NVIDIA's driver as a [`Machine`]: one context and one stream of one GPU.
//!
//! The libraries are opened at run time; a missing one is reported with a message. Contexts, streams, events, memory,
//! modules and graphs use cudarc's safe layer; functions that it does not have, or has in another form (cuBLASLt with an
//! algorithm that we select, launches with an attribute), are called directly. All of the `unsafe` for this is in this
//! folder. It is sound because everything runs in the order of one stream, where a kernel that starts early waits before it
//! touches memory; memory that the device reads or writes is either device memory, freed in that order, or pinned and kept
//! until an event shows that the device has finished with it.
#![allow(unsafe_code)]

pub mod compile;
mod graphs;
mod launch;
mod loader;
mod memory;
mod modules;
mod nccl;
mod pinned;
mod product;
mod run;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};
use cudarc::driver::{CudaContext, CudaStream};
use cudarc::{cublaslt, nvrtc};

pub use self::loader::Found;
use self::loader::Loader;
use self::memory::{DeviceMemory, Freed};
use self::nccl::Ranks;
use self::pinned::{Pinned, Spare};
use self::run::State;
use super::machine::{Answers, Buffer, Machine, Memory, Work};
use crate::backend::{CollectiveId, Collectives, Device, Result, Ticket};
use crate::config::Dtype;
use crate::error::BackendError;

/// Minimum compute capability: the copy engine, its barriers, and blocks with 227 KiB of shared memory.
const LEAST: (i32, i32) = (9, 0);
/// Minimum driver version, in the driver's numbers: CUDA 12.8 has every function that is called here. It is enough if NVRTC
/// of the same version compiles the kernels; those that come with the program are of CUDA 13.0, and `modules` reports this
/// when the driver refuses one.
const LEAST_DRIVER: i32 = 12_080;

/// Converts the result of a driver call to one of this crate.
pub(super) fn driver_call<T>(what: &str, result: std::result::Result<T, DriverError>) -> Result<T> {
    result.map_err(|error| {
        let reason = reason(error);
        match error.0 {
            // After these errors a context is unusable.
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

/// The driver's text for an error.
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

/// A library of NVIDIA's.
#[derive(Clone, Copy)]
enum Library {
    Driver,
    Nvrtc,
    CublasLt,
}

impl Library {
    /// Whether it is found. cudarc panics when a missing library is called.
    fn present(self) -> bool {
        // SAFETY: each call only tries to open a library.
        unsafe {
            match self {
                Self::Driver => sys::is_culib_present(),
                Self::Nvrtc => nvrtc::sys::is_culib_present(),
                Self::CublasLt => cublaslt::sys::is_culib_present(),
            }
        }
    }
}

/// Number of the driver's devices.
fn count() -> Result<usize> {
    if !Library::Driver.present() {
        return Err(unavailable(
            "there is no NVIDIA driver on this machine (libcuda is not found); --backend auto uses another device",
        ));
    }
    result::init().map_err(|error| {
        unavailable(format!(
            "the NVIDIA driver does not start ({}); --backend auto uses another device",
            reason(error)
        ))
    })?;
    let count = driver_call("its number of devices", result::device::get_count())?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// Every device of the driver, in its order; none without a driver.
#[must_use]
pub fn devices() -> Vec<Device> {
    let count = count().unwrap_or_else(|error| {
        if Library::Driver.present() {
            // A driver exists but cannot be used: the warning explains why no GPU is used.
            tracing::warn!("{error}");
        }
        0
    });
    (0..count)
        .filter_map(|index| describe(index).ok())
        .map(|(device, _)| device)
        .collect()
}

/// The sources of the kernels' code for device `index`. Nothing is loaded or compiled.
///
/// # Errors
/// No such device, or one that cannot be used, with the reason.
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
        precision: Dtype::Bf16,
        cache: Dtype::Bf16,
    };
    Ok((device, (major, minor)))
}

/// A version of CUDA in the driver's numbers, as text.
fn cuda_version(count: i32) -> String {
    format!("{}.{}", count / 1000, count % 1000 / 10)
}

/// The driver's version in its own numbers, if it and a device of this compute capability can be used.
fn usable(device: &Device, capability: (i32, i32)) -> Result<i32> {
    if capability < LEAST {
        return Err(unavailable(format!(
            "{} has compute capability {}.{}, but the kernels require {}.{} or newer; try --backend wgpu",
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
            "the NVIDIA driver supports CUDA {found}, but {least} (driver 570) or newer is required, 13.0 (driver 580) for the \
             kernels that come with the program: install a newer driver, or take --backend wgpu"
        )));
    }
    Ok(version)
}

/// One GPU.
pub struct Driver {
    device: Device,
    // Before the stream, so that it is dropped first: modules, graphs and pinned memory belong to its context.
    state: Mutex<State>,
    // After the state, whose graphs have kernels of NCCL.
    ranks: Arc<Ranks>,
    spare: Arc<Spare>,
    freed: Freed,
    stream: Arc<CudaStream>,
}

impl Driver {
    /// Opens device `index` of the driver, by default the first.
    ///
    /// # Errors
    /// No driver, no such device, one that is too old, no NVRTC or no cuBLASLt.
    pub fn open(index: Option<usize>) -> Result<Self> {
        let count = count()?;
        let index = index.unwrap_or(0);
        if index >= count {
            if count == 0 {
                return Err(unavailable(
                    "the NVIDIA driver finds no GPU; --backend auto uses another device",
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
        // cudarc's event tracking lets each use of memory wait for an event of its last use on another stream, which a
        // capture refuses.
        // SAFETY: there is a single stream, whose order is sufficient, and memory is freed on it.
        unsafe { context.disable_event_tracking() };
        let stream = driver_call("a stream", context.new_stream())?;
        let ranks = Arc::new(Ranks::new());
        let state = State::new(&stream, &ranks, capability, version)?;
        Ok(Self {
            device,
            state: Mutex::new(state),
            ranks,
            spare: Arc::new(Spare::new(&context)),
            freed: Freed::default(),
            stream,
        })
    }

    /// The stream's user, with the context current and nothing being captured.
    fn state(&self) -> Result<MutexGuard<'_, State>> {
        driver_call("its context", self.stream.context().bind_to_thread())?;
        // At worst, a panic left one graph less.
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.freed.give_back();
        Ok(state)
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // The fields free resources of this context that submitted work may still use. A lost context has freed them already.
        let _ = self.stream.synchronize();
    }
}

impl Machine for Driver {
    fn device(&self) -> &Device {
        &self.device
    }

    fn free_memory(&self) -> Option<u64> {
        let (free, _) = self.stream.context().mem_get_info().ok()?;
        Some(free as u64)
    }

    fn allocate(&self, what: &str, bytes: u64) -> Result<Box<dyn Memory>> {
        let _state = self.state()?;
        let memory = DeviceMemory::new(&self.stream, &self.freed, what, bytes)?;
        Ok(Box::new(memory))
    }

    fn write(&self, buffer: &Buffer, start: u64, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        // No capture may be in progress: the copy would be captured instead of run.
        let _state = self.state()?;
        memory::write(&self.stream, buffer, start, bytes)?;
        driver_call("a copy to the device", self.stream.synchronize())
    }

    fn submit(&self, work: &Work<'_>) -> Result<Ticket<Answers>> {
        let pending = self.state()?.submit(&self.spare, work)?;
        Ok(Ticket::new(pending))
    }

    fn forget(&self, step: u64) {
        if let Ok(mut state) = self.state() {
            state.forget(step);
        }
    }

    fn collectives(&self) -> Collectives {
        nccl::collectives()
    }

    fn collective_id(&self) -> Result<CollectiveId> {
        nccl::collective_id()
    }

    fn join(&self, id: CollectiveId, rank: usize, ranks: usize) -> Result<()> {
        let _state = self.state()?;
        self.ranks.join(&self.stream, id, [rank, ranks])
    }

    fn leave(&self) {
        self.ranks.leave();
        // NCCL frees a communicator when no graph has its kernels.
        if let Ok(mut state) = self.state() {
            state.forget_all();
        }
    }
}
