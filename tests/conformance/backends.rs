//! The backends of this machine. Add another one in [`all`].

use std::sync::{Mutex, PoisonError};

use kimi_linear::backend::Backend;
use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::conformance::report::SHARED;

/// Creates a backend.
pub(crate) type Make = fn() -> Box<dyn Backend>;

/// A backend under test, created when it is first used.
pub(crate) struct Bench {
    pub(crate) name: &'static str,
    pub(crate) make: Make,
    backend: Mutex<Option<(Box<dyn Backend>, usize)>>,
}

impl Bench {
    fn new(name: &'static str, make: Make) -> Self {
        Self {
            name,
            make,
            backend: Mutex::default(),
        }
    }

    /// Passes the backend to a function; trials on one backend run one at a time.
    pub(crate) fn with<R>(&self, run: impl FnOnce(&mut dyn Backend) -> R) -> R {
        // A trial that panicked leaves no state that the next one uses.
        let mut shared = self.backend.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut backend, used) = match shared.take() {
            Some((backend, used)) if used < SHARED => (backend, used),
            _ => ((self.make)(), 0),
        };
        let result = run(&mut *backend);
        *shared = Some((backend, used + 1));
        result
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
