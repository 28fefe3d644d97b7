//! Lists and selects adapters, and opens the device of a backend.
//!
//! The loss of a device, or an error that wgpu reports late, is stored here until the next call that can return it. This file
//! does not depend on models.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use super::faults::{Fault, Faults};
#[cfg(not(target_arch = "wasm32"))]
use crate::backend::block_on;
use crate::backend::{ConfirmedReport, Device, MaybeSend, Result, host};
use crate::config::Dtype;
use crate::error::BackendError;

/// Human-readable description of an adapter.
#[derive(Clone, Debug, serde::Serialize)]
pub struct AdapterDescription {
    /// Its index in this list, the `N` of `--device N`.
    pub index: usize,
    /// Its own name.
    pub name: String,
    /// Its kind: `discrete GPU`, `integrated GPU`, `virtual GPU`, `software` or `other`.
    pub kind: &'static str,
    /// Whether it is a hardware GPU, not a software adapter.
    pub gpu: bool,
    /// The graphics API of wgpu that drives it: `vulkan`, `metal`, `dx12`.
    pub api: String,
    /// The driver and its version.
    pub driver: String,
    /// The maximum size of a buffer, in bytes.
    pub largest_buffer: u64,
    /// The maximum size of a binding, in bytes: larger weights span several buffers.
    pub largest_binding: u64,
    /// Minimum and maximum size of a subgroup; `None` if shaders cannot use subgroups.
    pub subgroups: Option<(u32, u32)>,
}

impl AdapterDescription {
    /// The adapter as one device among those of all backends.
    #[must_use]
    pub fn device(&self) -> Device {
        Device {
            backend: "wgpu",
            index: self.index,
            name: format!("{} ({}, {})", self.name, self.kind, self.api),
            // wgpu does not report a discrete GPU's memory; other adapters share the machine's.
            memory_bytes: if self.kind == "discrete GPU" {
                None
            } else {
                host::memory()
            },
            precision: Dtype::F32,
            cache: Dtype::F32,
        }
    }
}

/// Every adapter, best first: discrete GPUs, integrated ones, virtual ones, others, and software adapters last.
#[cfg(not(target_arch = "wasm32"))]
#[must_use]
pub fn adapters() -> Vec<AdapterDescription> {
    describe_all(&block_on(enumerate()))
}

/// The adapter that the browser gives, if it gives one.
#[cfg(target_arch = "wasm32")]
pub async fn adapters() -> Vec<AdapterDescription> {
    describe_all(&enumerate().await)
}

fn describe_all(list: &[wgpu::Adapter]) -> Vec<AdapterDescription> {
    list.iter()
        .enumerate()
        .map(|(index, adapter)| describe(index, adapter))
        .collect()
}

/// Whether this machine has a hardware GPU that the backend can drive. `auto` selects wgpu only if it has one.
#[cfg(not(target_arch = "wasm32"))]
#[must_use]
pub fn has_gpu() -> bool {
    adapters().iter().any(|adapter| adapter.gpu)
}

fn rank(kind: wgpu::DeviceType) -> usize {
    match kind {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    }
}

async fn enumerate() -> Vec<wgpu::Adapter> {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = wgpu::Backends::VULKAN
        | wgpu::Backends::METAL
        | wgpu::Backends::DX12
        | wgpu::Backends::BROWSER_WEBGPU;
    // Validation layers are enabled by environment variables, for development.
    descriptor.flags = wgpu::InstanceFlags::empty().with_env();
    let instance = wgpu::Instance::new(descriptor);
    let mut list = instance.enumerate_adapters(wgpu::Backends::all()).await;
    list.sort_by_key(|adapter| rank(adapter.get_info().device_type));
    list
}

fn describe(index: usize, adapter: &wgpu::Adapter) -> AdapterDescription {
    let (info, limits) = (adapter.get_info(), adapter.limits());
    AdapterDescription {
        index,
        // A browser may keep the name to itself.
        name: match info.name.trim() {
            "" => "unnamed GPU".to_owned(),
            name => name.to_owned(),
        },
        kind: match info.device_type {
            wgpu::DeviceType::DiscreteGpu => "discrete GPU",
            wgpu::DeviceType::IntegratedGpu => "integrated GPU",
            wgpu::DeviceType::VirtualGpu => "virtual GPU",
            wgpu::DeviceType::Cpu => "software",
            wgpu::DeviceType::Other => "other",
        },
        gpu: matches!(
            info.device_type,
            wgpu::DeviceType::DiscreteGpu
                | wgpu::DeviceType::IntegratedGpu
                | wgpu::DeviceType::VirtualGpu
        ),
        api: info.backend.to_string(),
        driver: format!("{} {}", info.driver, info.driver_info)
            .trim()
            .to_owned(),
        largest_buffer: limits.max_buffer_size,
        largest_binding: limits.max_storage_buffer_binding_size,
        subgroups: adapter
            .features()
            .contains(wgpu::Features::SUBGROUP)
            .then_some((info.subgroup_min_size, info.subgroup_max_size)),
    }
}

/// Checks the limits that the shaders require, which are WebGPU's minimums. Adapters below them are rejected with an error
/// that names the limit.
fn check(description: &AdapterDescription, limits: &wgpu::Limits) -> Result<()> {
    let needed = [
        (
            "storage buffers per shader",
            u64::from(limits.max_storage_buffers_per_shader_stage),
            8,
        ),
        (
            "bytes of workgroup memory",
            u64::from(limits.max_compute_workgroup_storage_size),
            16 << 10,
        ),
        (
            "threads per workgroup",
            u64::from(limits.max_compute_invocations_per_workgroup),
            256,
        ),
        (
            "workgroups per dimension",
            u64::from(limits.max_compute_workgroups_per_dimension),
            65535,
        ),
        (
            "bytes per binding",
            limits.max_storage_buffer_binding_size,
            1 << 20,
        ),
    ];
    for (what, found, least) in needed {
        if found < least {
            return Err(unavailable(format!(
                "{} supports {found} {what}, but {least} are required",
                description.name
            )));
        }
    }
    Ok(())
}

pub(super) fn unavailable(reason: String) -> BackendError {
    BackendError::Unavailable {
        backend: "wgpu",
        reason,
    }
}

/// A device, its queue, and their errors.
pub(super) struct Gpu {
    pub(super) device: wgpu::Device,
    pub(super) queue: wgpu::Queue,
    pub(super) description: Device,
    /// Maximum number of bytes of a binding.
    pub(super) binding_limit: u64,
    /// Maximum number of bytes of a buffer.
    pub(super) buffer_limit: u64,
    /// Required alignment of a uniform binding's offset, in bytes.
    pub(super) uniform_alignment: u64,
    /// Whether shaders may shuffle among eight threads.
    pub(super) subgroups: bool,
    /// Nanoseconds per tick of its clock; `None` if passes cannot be timed.
    pub(super) tick: Option<f32>,
    /// Whether it is a software adapter, which runs on the CPU.
    pub(super) software: bool,
    fault: Arc<Mutex<Option<BackendError>>>,
    /// Error scopes without a result so far.
    unsettled: Mutex<Vec<Unsettled>>,
    /// Receives the number of error scopes with a result while a submission waits for them.
    report: Mutex<Option<ConfirmedReport>>,
    pub(super) faults: Arc<Faults>,
}

/// The future of an error scope. A trait of its own, because a box may only combine [`Future`] with auto traits.
trait Scope: Future<Output = Option<wgpu::Error>> + MaybeSend {}
impl<F: Future<Output = Option<wgpu::Error>> + MaybeSend> Scope for F {}

/// An error scope of a call, whose result wgpu reports later.
pub(super) struct Unsettled {
    what: String,
    bytes: u64,
    scope: Pin<Box<dyn Scope>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gpu {
    /// Opens adapter `index` of the list, or its first.
    pub(super) async fn open(index: Option<usize>) -> Result<Self> {
        let list = enumerate().await;
        let descriptions = describe_all(&list);
        if list.is_empty() {
            return Err(unavailable(
                "no graphics adapter was found; install a Vulkan driver (the package mesa-vulkan-drivers has one that \
                 runs on the CPU), or use --backend cpu"
                    .to_owned(),
            ));
        }
        let chosen = index.unwrap_or(0);
        let (Some(adapter), Some(description)) = (list.get(chosen), descriptions.get(chosen))
        else {
            let names: Vec<_> = descriptions
                .iter()
                .map(|adapter| format!("number {}, {}", adapter.index, adapter.name))
                .collect();
            return Err(BackendError::NoSuchDevice {
                backend: "wgpu",
                index: chosen,
                available: names.join(", "),
            });
        };
        let limits = adapter.limits();
        check(description, &limits)?;
        let info = adapter.get_info();
        let subgroups =
            adapter.features().contains(wgpu::Features::SUBGROUP) && info.subgroup_min_size >= 8;
        let timestamps = adapter.features() & wgpu::Features::TIMESTAMP_QUERY;
        let mut features = timestamps;
        features.set(wgpu::Features::SUBGROUP, subgroups);
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("kimi-linear"),
            required_features: features,
            required_limits: limits.clone(),
            memory_hints: wgpu::MemoryHints::MemoryUsage,
            ..Default::default()
        };
        let opened = adapter.request_device(&descriptor).await;
        let (device, queue) = opened.map_err(|error| {
            unavailable(format!("{} cannot be opened: {error}", description.name))
        })?;
        let fault = Arc::<Mutex<Option<BackendError>>>::default();
        let (late, lost) = (Arc::clone(&fault), Arc::clone(&fault));
        device.on_uncaptured_error(Arc::new(move |error| {
            lock(&late).get_or_insert(translate("a submission", 0, error));
        }));
        device.set_device_lost_callback(move |_, message| {
            let reason = match message.trim_end_matches('.') {
                "" => "the driver gave no reason".to_owned(),
                message => message.to_owned(),
            };
            lock(&lost).get_or_insert(BackendError::Lost {
                backend: "wgpu",
                reason,
            });
        });
        Ok(Self {
            tick: (!timestamps.is_empty()).then(|| queue.get_timestamp_period()),
            device,
            queue,
            description: description.device(),
            binding_limit: limits.max_storage_buffer_binding_size,
            buffer_limit: limits.max_buffer_size,
            uniform_alignment: u64::from(limits.min_uniform_buffer_offset_alignment).max(16),
            subgroups,
            software: description.kind == "software",
            fault,
            unsettled: Mutex::default(),
            report: Mutex::default(),
            faults: Arc::default(),
        })
    }

    /// Fails if the device was lost or reported an error since the last call.
    pub(super) fn healthy(&self) -> Result<()> {
        let mut fault = lock(&self.fault);
        match &*fault {
            // A lost device stays lost.
            Some(BackendError::Lost { .. }) => fault.clone().map_or(Ok(()), Err),
            _ => fault.take().map_or(Ok(()), Err),
        }
    }

    /// The loss of the device if that is why `error` was reported, else `error`. A browser may report the loss after the call
    /// that failed for it: for half a second there it is waited for.
    pub(super) async fn cause(&self, error: BackendError) -> BackendError {
        #[cfg(target_arch = "wasm32")]
        for _ in 0..10 {
            if matches!(error, BackendError::Lost { .. }) || lock(&self.fault).is_some() {
                break;
            }
            crate::backend::pause(50).await;
        }
        match &*lock(&self.fault) {
            Some(lost @ BackendError::Lost { .. }) => lost.clone(),
            _ => error,
        }
    }

    /// Counts a call of the device, for tests that inject a failure.
    ///
    /// # Errors
    /// The error that a test injected, or that of [`Gpu::healthy`].
    pub(super) fn call(&self, what: &str, bytes: u64) -> Result<()> {
        match self.faults.call() {
            Some(Fault::Lost) => self.lose(),
            Some(fault) => return Err(fault.error("wgpu", what, bytes)),
            None => {}
        }
        self.healthy()
    }

    /// Runs `make` and returns its result, or the error that wgpu reports. `what` and `bytes` are for the message. Natively
    /// wgpu reports at once; a result that a browser reports later is in [`Gpu::unsettled`], and the next submission's ticket
    /// waits for it.
    pub(super) fn guarded<T>(&self, what: &str, bytes: u64, make: impl FnOnce() -> T) -> Result<T> {
        self.call(what, bytes)?;
        let scopes = [
            wgpu::ErrorFilter::Validation,
            wgpu::ErrorFilter::OutOfMemory,
            wgpu::ErrorFilter::Internal,
        ]
        .map(|filter| self.device.push_error_scope(filter));
        let made = make();
        let mut errors = None;
        for scope in scopes.into_iter().rev() {
            let mut scope = Box::pin(scope.pop());
            match scope.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(error) => errors = error.or(errors),
                Poll::Pending => lock(&self.unsettled).push(Unsettled {
                    what: what.to_owned(),
                    bytes,
                    scope,
                }),
            }
        }
        match errors {
            Some(error) => Err(translate(what, bytes, error)),
            // A device that was lost meanwhile reports nothing to error scopes.
            None => self.healthy().map(|()| made),
        }
    }

    /// Destroys the device, as if the driver had lost it.
    pub(super) fn lose(&self) {
        self.device.destroy();
        // The loss is reported when no work is left; the result of that wait does not matter, because the device is gone.
        drop(self.device.poll(wgpu::PollType::wait_indefinitely()));
    }

    /// Waits until the device has copied what was queued so far.
    ///
    /// # Errors
    /// A device that does not answer.
    pub(super) fn drain(&self, what: &str) -> Result<()> {
        let submission_index = Some(self.queue.submit([]));
        let wait = wgpu::PollType::Wait {
            submission_index,
            timeout: None,
        };
        let waited = self.device.poll(wait);
        waited.map(drop).map_err(|error| BackendError::Driver {
            backend: "wgpu",
            what: format!("to copy {what}"),
            reason: error.to_string(),
        })
    }

    /// The error scopes of all calls so far without a result.
    pub(super) fn unsettled(&self) -> Vec<Unsettled> {
        std::mem::take(&mut *lock(&self.unsettled))
    }

    /// Passes the number of error scopes with a result, and of all, to `report` from now on.
    pub(super) fn report_settled(&self, report: ConfirmedReport) {
        *lock(&self.report) = Some(report);
    }

    /// Waits for the results of these error scopes.
    ///
    /// # Errors
    /// The error of the first call that wgpu rejected.
    pub(super) async fn settle(&self, calls: Vec<Unsettled>) -> Result<()> {
        let mut outcome = Ok(());
        let all = calls.len();
        for (done, call) in calls.into_iter().enumerate() {
            let error = call.scope.await;
            let refused = error.map(|error| translate(&call.what, call.bytes, error));
            outcome = outcome.and(refused.map_or(Ok(()), Err));
            if let Some(report) = &*lock(&self.report) {
                report(done + 1, all);
            }
        }
        outcome
    }

    /// Creates a zeroed buffer of `bytes` (at least one word) for shaders and copies.
    pub(super) fn buffer(&self, what: &str, bytes: u64) -> Result<wgpu::Buffer> {
        if bytes > self.binding_limit.min(self.buffer_limit) {
            return Err(BackendError::TooLarge {
                backend: "wgpu",
                what: what.to_owned(),
                bytes,
                limit: self.binding_limit.min(self.buffer_limit),
            });
        }
        self.buffer_for(
            what,
            bytes,
            wgpu::BufferUsages::STORAGE
                | wgpu::BufferUsages::COPY_SRC
                | wgpu::BufferUsages::COPY_DST,
        )
    }

    /// Creates a buffer for other uses.
    pub(super) fn buffer_for(
        &self,
        what: &str,
        bytes: u64,
        usage: wgpu::BufferUsages,
    ) -> Result<wgpu::Buffer> {
        self.guarded(what, bytes, || {
            self.device.create_buffer(&wgpu::BufferDescriptor {
                label: Some(what),
                size: bytes.next_multiple_of(4).max(16),
                usage,
                mapped_at_creation: false,
            })
        })
    }
}

/// Converts an error of wgpu to one of this crate.
fn translate(what: &str, bytes: u64, error: wgpu::Error) -> BackendError {
    match error {
        wgpu::Error::OutOfMemory { .. } => BackendError::OutOfMemory {
            what: what.to_owned(),
            bytes,
        },
        wgpu::Error::Validation { description, .. } | wgpu::Error::Internal { description, .. } => {
            BackendError::Driver {
                backend: "wgpu",
                what: what.to_owned(),
                reason: description.trim().to_owned(),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn an_adapter_without_what_shaders_need_is_refused_by_name() {
        let adapter = AdapterDescription {
            index: 0,
            name: "Old Card".to_owned(),
            kind: "discrete GPU",
            gpu: true,
            api: "vulkan".to_owned(),
            driver: String::new(),
            largest_buffer: 0,
            largest_binding: 0,
            subgroups: None,
        };
        let limits = wgpu::Limits::default();
        assert_eq!(check(&adapter, &limits), Ok(()));
        let limits = wgpu::Limits {
            max_storage_buffers_per_shader_stage: 4,
            ..limits
        };
        let error = check(&adapter, &limits).unwrap_err();
        let expected = "backend wgpu cannot be used: Old Card supports 4 storage buffers per shader, but 8 are required";
        assert_eq!(error.to_string(), expected);
    }
}
