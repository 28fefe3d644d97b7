//! The trace: its numbers are those of naive double-precision code, and without it nothing is different.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "../engine_harness/mod.rs"]
mod engine_harness;
mod frames;
mod operations;

use engine_harness::tokens;
use kimi_linear::backend::Backend;
use kimi_linear::backend::cpu::CpuBackend;

const BOUND: f64 = 1e-5;

fn cpu() -> Box<dyn Backend> {
    Box::new(CpuBackend::new())
}

/// What runs on every backend of this build.
type Make = fn() -> Box<dyn Backend>;

#[cfg(not(feature = "wgpu"))]
const BACKENDS: &[Make] = &[cpu];
#[cfg(feature = "wgpu")]
const BACKENDS: &[Make] = &[cpu, gpu::whole, gpu::cut];

/// The names that `--backend` takes of them.
#[cfg(not(feature = "wgpu"))]
const NAMES: &[&str] = &["cpu"];
#[cfg(feature = "wgpu")]
const NAMES: &[&str] = &["cpu", "wgpu"];

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

/// Numbers between -1 and 1, from a seed.
fn numbers(seed: u64, count: usize) -> Vec<f32> {
    tokens(seed, count)
        .into_iter()
        .map(|token| token as f32 / 125.0 - 1.0)
        .collect()
}
