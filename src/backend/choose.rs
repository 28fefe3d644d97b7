//! Which backends there are, which devices they see, and one of them by name.

use super::cpu::{self, CpuBackend};
use super::{Backend, Device, Result};
use crate::error::BackendError;

/// A backend by name, or the best there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendKind {
    /// A GPU if there is one, else the processor.
    Auto,
    /// The plain reference.
    Cpu,
    /// WGSL on any GPU.
    Wgpu,
    /// CUDA on NVIDIA GPUs.
    Cuda,
}

/// Every device that some backend of this build can use.
#[must_use]
pub fn devices() -> Vec<Device> {
    vec![cpu::describe()]
}

/// Opens device `index` of a backend.
///
/// # Errors
/// A backend that this build does not have, or a device that is not there.
pub fn open(kind: BackendKind, index: usize) -> Result<Box<dyn Backend>> {
    match kind {
        BackendKind::Auto | BackendKind::Cpu => {
            if index > 0 {
                let available = "one cpu device, number 0".to_owned();
                return Err(BackendError::NoSuchDevice {
                    backend: "cpu",
                    index,
                    available,
                });
            }
            Ok(Box::new(CpuBackend::new()))
        }
        BackendKind::Wgpu => Err(missing("wgpu")),
        BackendKind::Cuda => Err(missing("cuda")),
    }
}

fn missing(backend: &'static str) -> BackendError {
    let reason = "this build does not have it; --backend cpu runs anywhere".to_owned();
    BackendError::Unavailable { backend, reason }
}
