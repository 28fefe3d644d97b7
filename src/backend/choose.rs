//! Lists the backends of this build and their devices, and opens one by name.

use super::cpu::{self, CpuBackend};
#[cfg(feature = "cuda")]
use super::cuda::{self, CudaBackend};
#[cfg(feature = "wgpu")]
use super::wgpu::{self, WgpuBackend};
use super::{Backend, Device, Result};
use crate::error::BackendError;

/// A backend by name, or the best one available.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendKind {
    /// A hardware GPU if there is one, through CUDA if possible, else the CPU. Never a software adapter.
    Auto,
    /// The reference, in plain Rust.
    Cpu,
    /// WGSL on any GPU, or on a software adapter if there is no GPU.
    Wgpu,
    /// CUDA on NVIDIA GPUs.
    Cuda,
}

/// Every device that some backend of this build can use.
#[cfg(not(target_arch = "wasm32"))]
#[must_use]
pub fn devices() -> Vec<Device> {
    let devices = vec![cpu::describe()];
    #[cfg(feature = "cuda")]
    let devices: Vec<_> = cuda::driver::devices().into_iter().chain(devices).collect();
    #[cfg(feature = "wgpu")]
    let devices = devices
        .into_iter()
        .chain(
            wgpu::adapters()
                .iter()
                .map(wgpu::AdapterDescription::device),
        )
        .collect();
    devices
}

/// The CPU, and what the browser gives as its GPU.
#[cfg(target_arch = "wasm32")]
pub async fn devices() -> Vec<Device> {
    let devices = vec![cpu::describe()];
    #[cfg(feature = "wgpu")]
    let devices = {
        let adapters = wgpu::adapters().await;
        let gpus = adapters.iter().map(wgpu::AdapterDescription::device);
        devices.into_iter().chain(gpus).collect()
    };
    devices
}

/// Opens a backend in a browser: `Auto` is WebGPU.
///
/// # Errors
/// A backend that this build does not include, or a browser without WebGPU.
#[cfg(target_arch = "wasm32")]
pub async fn open(kind: BackendKind, _: Option<usize>) -> Result<Box<dyn Backend>> {
    match kind {
        BackendKind::Cpu => Ok(Box::new(CpuBackend::new())),
        #[cfg(feature = "wgpu")]
        BackendKind::Auto | BackendKind::Wgpu => {
            Ok(Box::new(WgpuBackend::open(wgpu::Options::default()).await?))
        }
        #[cfg(not(feature = "wgpu"))]
        BackendKind::Auto | BackendKind::Wgpu => Err(missing("wgpu")),
        BackendKind::Cuda => Err(missing("cuda")),
    }
}

/// Opens device `index` of a backend, or the best one.
///
/// # Errors
/// A backend that this build does not include, or a device that does not exist.
#[cfg(not(target_arch = "wasm32"))]
pub fn open(kind: BackendKind, index: Option<usize>) -> Result<Box<dyn Backend>> {
    match kind {
        #[cfg(feature = "cuda")]
        BackendKind::Auto if !cuda::driver::devices().is_empty() => {
            // A GPU that is too old for CUDA, or lacks a library, may still run shaders.
            CudaBackend::open(index).map_or_else(
                |error| {
                    tracing::warn!("{error}");
                    open(without_cuda(), index)
                },
                |backend| Ok(Box::new(backend) as Box<dyn Backend>),
            )
        }
        BackendKind::Auto if has_gpu() => open(BackendKind::Wgpu, index),
        BackendKind::Auto | BackendKind::Cpu => match index {
            None | Some(0) => Ok(Box::new(CpuBackend::new())),
            Some(index) => {
                let available = "one cpu device, number 0".to_owned();
                Err(BackendError::NoSuchDevice {
                    backend: "cpu",
                    index,
                    available,
                })
            }
        },
        #[cfg(feature = "wgpu")]
        BackendKind::Wgpu => {
            let options = wgpu::Options {
                adapter: index,
                ..wgpu::Options::default()
            };
            Ok(Box::new(WgpuBackend::with_options(options)?))
        }
        #[cfg(not(feature = "wgpu"))]
        BackendKind::Wgpu => Err(missing("wgpu")),
        #[cfg(feature = "cuda")]
        BackendKind::Cuda => Ok(Box::new(CudaBackend::open(index)?)),
        #[cfg(not(feature = "cuda"))]
        BackendKind::Cuda => Err(missing("cuda")),
    }
}

/// The backend that `auto` selects if CUDA cannot be used.
#[cfg(all(feature = "cuda", not(target_arch = "wasm32")))]
fn without_cuda() -> BackendKind {
    if has_gpu() {
        BackendKind::Wgpu
    } else {
        BackendKind::Cpu
    }
}

#[cfg(not(target_arch = "wasm32"))]
fn has_gpu() -> bool {
    #[cfg(feature = "wgpu")]
    let found = wgpu::has_gpu();
    #[cfg(not(feature = "wgpu"))]
    let found = false;
    found
}

#[cfg(any(target_arch = "wasm32", not(all(feature = "wgpu", feature = "cuda"))))]
fn missing(backend: &'static str) -> BackendError {
    let reason = "this build does not have it; --backend cpu runs anywhere".to_owned();
    BackendError::Unavailable { backend, reason }
}
