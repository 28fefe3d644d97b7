//! The backends of this machine. Add another one in [`all`].

use std::sync::{Mutex, MutexGuard, PoisonError};

use kimi_linear::backend::Backend;
use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::conformance::report::SHARED;

/// Creates a backend.
pub(crate) type Make = fn() -> Box<dyn Backend>;

/// A backend under test.
pub(crate) struct Bench {
    pub(crate) name: &'static str,
    pub(crate) make: Make,
    /// Backends that no trial is using, with the number of trials that each has run.
    idle: Mutex<Vec<(Box<dyn Backend>, usize)>>,
}

impl Bench {
    fn new(name: &'static str, make: Make) -> Self {
        Self {
            name,
            make,
            idle: Mutex::default(),
        }
    }

    /// Passes a backend to a function: an idle one, or a new one. Each thread of trials thus has its own.
    pub(crate) fn with<R>(&self, run: impl FnOnce(&mut dyn Backend) -> R) -> R {
        let idle = self.idle().pop();
        let (mut backend, used) = idle.unwrap_or_else(|| ((self.make)(), 0));
        // A trial that panics drops its backend.
        let result = run(&mut *backend);
        if used + 1 < SHARED {
            self.idle().push((backend, used + 1));
        }
        result
    }

    fn idle(&self) -> MutexGuard<'_, Vec<(Box<dyn Backend>, usize)>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Every backend of this machine.
pub(crate) fn all() -> Vec<Bench> {
    let benches = [Bench::new("cpu", || Box::new(CpuBackend::new()))];
    #[cfg(feature = "wgpu")]
    let benches = benches.into_iter().chain(wgpu());
    #[cfg(feature = "cuda")]
    let benches = benches.into_iter().chain([cuda_emulated()]);
    benches.into_iter().collect()
}

/// The best adapter, with and without subgroups. A machine without an adapter fails: `make test` installs a software driver.
#[cfg(feature = "wgpu")]
fn wgpu() -> Vec<Bench> {
    use kimi_linear::backend::wgpu::{Options, WgpuBackend};

    fn open(options: Options) -> Box<dyn Backend> {
        Box::new(WgpuBackend::with_options(options).unwrap_or_else(|error| {
            panic!("{error}. Or install one that runs on the CPU: apt-get install mesa-vulkan-drivers libvulkan1")
        }))
    }
    vec![
        Bench::new("wgpu", || open(Options::default())),
        Bench::new("wgpu-plain", || {
            open(Options {
                subgroups: false,
                weight_limit: Some(1 << 20),
                window: 64,
                span: 64,
                ..Options::default()
            })
        }),
    ]
}

/// The CUDA kernels on the CPU, each launch with its threads in three orders that must give the same bits.
#[cfg(feature = "cuda")]
fn cuda_emulated() -> Bench {
    use crate::emulated::{ORDERS, open};

    Bench::new("cuda-emulated", || open(ORDERS))
}
