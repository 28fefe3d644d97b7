//! The trace: its numbers are those of naive double-precision code, and without it results are unchanged.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[cfg(feature = "cuda")]
#[path = "../common/emulated.rs"]
mod emulated;
#[path = "../engine_harness/mod.rs"]
mod engine_harness;
mod frames;
mod operations;
mod undo;

use engine_harness::tokens;
use kimi_linear::backend::Backend;
use kimi_linear::backend::cpu::CpuBackend;

const BOUND: f64 = 1e-5;

fn cpu() -> Box<dyn Backend> {
    Box::new(CpuBackend::new())
}

/// Creates a backend of this build.
type Make = fn() -> Box<dyn Backend>;

/// Each with its name in the tests.
const BACKENDS: &[(&str, Make)] = &[
    ("cpu", cpu),
    #[cfg(feature = "wgpu")]
    ("wgpu", gpu::whole),
    #[cfg(feature = "wgpu")]
    ("wgpu in segments", gpu::cut),
    #[cfg(feature = "cuda")]
    (EMULATED, || emulated::open(emulated::ORDERS)),
];

/// The backends for whole models: one of the above cuts weights finer than a model's rows, and three orders of threads take
/// too long.
const WHOLE: &[(&str, Make)] = &[
    ("cpu", cpu),
    #[cfg(feature = "wgpu")]
    ("wgpu", gpu::whole),
    #[cfg(feature = "cuda")]
    (EMULATED, || emulated::open(&emulated::ORDERS[..1])),
];

/// The CUDA kernels on the CPU. An untraced step has fused kernels with fewer roundings, so that a trace may change the last
/// bits of bf16.
const EMULATED: &str = "cuda-emulated";

#[cfg(feature = "wgpu")]
mod gpu {
    use kimi_linear::backend::Backend;
    use kimi_linear::backend::wgpu::{Options, WgpuBackend};

    fn open(options: Options) -> Box<dyn Backend> {
        let backend = WgpuBackend::with_options(options);
        Box::new(backend.unwrap_or_else(|error| {
            panic!("{error}. These tests need a Vulkan driver: apt-get install mesa-vulkan-drivers libvulkan1")
        }))
    }

    pub(super) fn whole() -> Box<dyn Backend> {
        open(Options::default())
    }

    /// Without subgroups, and with weights cut into buffers of a few rows.
    pub(super) fn cut() -> Box<dyn Backend> {
        open(Options {
            subgroups: false,
            weight_limit: Some(300),
            ..Options::default()
        })
    }
}

#[track_caller]
fn close(what: &str, found: f32, expected: f64) {
    let error = (f64::from(found) - expected).abs() / expected.abs().max(1e-3);
    assert!(error <= BOUND, "{what}: {found} against {expected}");
}

/// Numbers between -1 and 1 from a seed, exact in bf16, so that all backends have the same inputs.
fn numbers(seed: u64, count: usize) -> Vec<f32> {
    tokens(seed, count)
        .into_iter()
        .map(|token| (token as f32 - 125.0) / 128.0)
        .collect()
}
