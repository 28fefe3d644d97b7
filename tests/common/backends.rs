//! The backends on which whole models are tested: the CPU, and if they are compiled in, the best adapter and the emulated
//! CUDA machine.
#![allow(dead_code, unreachable_pub, missing_docs, clippy::panic)]

use kimi_linear::backend::Backend;
use kimi_linear::backend::cpu::CpuBackend;

#[cfg(feature = "cuda")]
use crate::emulated;

pub type Open = fn() -> Box<dyn Backend>;

pub fn cpu() -> Box<dyn Backend> {
    Box::new(CpuBackend::new())
}

#[cfg(feature = "wgpu")]
pub fn wgpu() -> Box<dyn Backend> {
    let options = kimi_linear::backend::wgpu::Options::default();
    let backend = kimi_linear::backend::wgpu::WgpuBackend::with_options(options);
    Box::new(backend.unwrap_or_else(|error| {
        panic!("{error}. These tests need a Vulkan driver: apt-get install mesa-vulkan-drivers libvulkan1")
    }))
}

#[cfg(feature = "cuda")]
pub fn cuda() -> Box<dyn Backend> {
    emulated::open(&emulated::ORDERS[..1])
}

pub const BACKENDS: &[(&str, Open)] = &[
    ("cpu", cpu),
    #[cfg(feature = "wgpu")]
    ("wgpu", wgpu),
    #[cfg(feature = "cuda")]
    ("cuda-emulated", cuda),
];
