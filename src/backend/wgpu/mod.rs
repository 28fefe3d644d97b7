//! The wgpu backend: every operation as a WGSL shader, on any GPU with Vulkan, Metal or DX12.
//!
//! f32 arithmetic; weights and latents keep their dtype and are widened in the shader. The shaders are in `shaders/`, each
//! the counterpart of a file in `src/backend/cpu/`. A step is one submission. It supports a single rank.

mod answers;
mod attention;
mod device;
mod experts;
mod faults;
mod fill;
mod kda;
mod memory;
mod operations;
mod params;
mod pipelines;
mod readback;
mod sample;
pub mod shaders;
mod step;
mod timing;
mod trace;
mod weights;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use self::device::AdapterDescription;
use self::device::Gpu;
pub use self::device::adapters;
#[cfg(not(target_arch = "wasm32"))]
pub use self::device::has_gpu;
#[doc(hidden)]
pub use self::faults::{Fault, Faults};
use self::memory::Memory;
use self::pipelines::Pipelines;
use self::readback::Spare;
use super::check;
use super::gpu::later;
use super::{
    Backend, Block, Capacity, ConfirmedReport, Device, Element, LatentLayout, LatentPool,
    LatentRecord, MemoryUse, Place, Program, Random, RandomWeight, Result, Rows, Slot, StateLayout,
    StatePool, StateRecord, Step, Tensor, TensorValues, Ticket, Weight, WeightSource,
};
use crate::config::Dtype;
use crate::error::BackendError;

/// How a backend is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// The index in [`adapters`]; `None` for the best adapter.
    pub adapter: Option<usize>,
    /// Whether shaders may use subgroups if the adapter has them. Results are the same to the bit.
    pub subgroups: bool,
    /// Maximum bytes of a weight in one buffer, if less than the device can bind: for tests of weights that span several.
    /// `None` for the device's limit.
    pub weight_limit: Option<u64>,
    /// Positions whose keys and values a prefill expands together, a multiple of 64.
    pub window: usize,
    /// Positions that one workgroup of a decode attends to; more are divided among several, so other spans round differently.
    /// A multiple of 64.
    pub span: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            adapter: None,
            subgroups: true,
            weight_limit: None,
            window: 512,
            span: 512,
        }
    }
}

/// State that backend, steps and tickets share.
struct Shared {
    gpu: Gpu,
    memory: Mutex<Memory>,
    pipelines: Mutex<Pipelines>,
    window: usize,
    span: usize,
}

impl Shared {
    fn memory(&self) -> MutexGuard<'_, Memory> {
        // Handles are added as a whole, so a panic elsewhere leaves the tables consistent.
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One adapter and its memory.
pub struct WgpuBackend {
    shared: Arc<Shared>,
    spare: Arc<Spare>,
    weight_limit: u64,
}

impl WgpuBackend {
    /// Opens the best adapter, possibly a software adapter: see [`Backend::device`].
    ///
    /// # Errors
    /// No adapter, or one that lacks limits that the shaders require.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn new() -> Result<Self> {
        Self::with_options(Options::default())
    }

    /// Opens an adapter with `options`, and waits for it.
    ///
    /// # Errors
    /// Those of [`WgpuBackend::open`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn with_options(options: Options) -> Result<Self> {
        super::block_on(Self::open(options))
    }

    /// Opens an adapter with `options`.
    ///
    /// # Errors
    /// No such adapter, one that lacks limits that the shaders require, or a window or span that is not a multiple of 64.
    pub async fn open(options: Options) -> Result<Self> {
        for (what, positions) in [("window", options.window), ("span", options.span)] {
            if positions == 0 || !positions.is_multiple_of(64) {
                return Err(BackendError::Unsupported {
                    backend: "wgpu",
                    what: format!("a {what} of {positions} positions: not a multiple of 64"),
                });
            }
        }
        let mut gpu = Gpu::open(options.adapter).await?;
        gpu.subgroups &= options.subgroups;
        let limit = gpu.binding_limit.min(gpu.buffer_limit);
        Ok(Self {
            weight_limit: options
                .weight_limit
                .map_or(limit, |wanted| wanted.min(limit)),
            shared: Arc::new(Shared {
                gpu,
                memory: Mutex::new(Memory::new("wgpu")),
                pipelines: Mutex::default(),
                window: options.window,
                span: options.span,
            }),
            spare: Arc::default(),
        })
    }

    /// Whether the shaders use subgroups.
    #[must_use]
    pub fn uses_subgroups(&self) -> bool {
        self.shared.gpu.subgroups
    }

    /// Destroys the device, as if the driver had lost it: for tests.
    #[doc(hidden)]
    pub fn lose_device(&self) {
        self.shared.gpu.lose();
    }

    /// The calls of the device, into which tests inject failures.
    #[doc(hidden)]
    #[must_use]
    pub fn faults(&self) -> Arc<Faults> {
        Arc::clone(&self.shared.gpu.faults)
    }

    /// Whether this device compiles a WGSL shader with an entry point `main` and no bindings; the driver's message if not.
    ///
    /// # Errors
    /// [`BackendError::Driver`] with the compiler's message.
    pub fn compiles(&self, wgsl: &str) -> Result<()> {
        pipelines::compiles(&self.shared.gpu, wgsl)
    }

    /// Copies ranges of buffers to the host: each is a buffer, an offset and a length in bytes.
    fn read(&self, parts: &[(&wgpu::Buffer, u64, u64)]) -> Result<Ticket<Vec<u32>>> {
        let bytes = parts.iter().map(|(_, _, bytes)| bytes).sum();
        let shared = &self.shared;
        let answer = self.spare.take(shared, bytes)?;
        let what = "a copy to the host";
        readback::submit(shared, &self.spare, what, answer, bytes, |answer| {
            let descriptor = wgpu::CommandEncoderDescriptor::default();
            let mut encoder = shared.gpu.device.create_command_encoder(&descriptor);
            let mut to = 0;
            for (buffer, offset, bytes) in parts {
                if *bytes > 0 {
                    encoder.copy_buffer_to_buffer(buffer, *offset, answer, to, *bytes);
                }
                to += bytes;
            }
            encoder
        })
    }

    fn write(&self, what: &str, buffer: &wgpu::Buffer, offset: u64, bytes: &[u8]) -> Result<()> {
        self.shared.gpu.guarded(what, bytes.len() as u64, || {
            self.shared.gpu.queue.write_buffer(buffer, offset, bytes);
        })
    }
}

impl Backend for WgpuBackend {
    fn device(&self) -> &Device {
        &self.shared.gpu.description
    }

    fn is_asynchronous(&self) -> bool {
        true
    }

    fn weight(&mut self, source: WeightSource) -> Result<Weight> {
        let weight = weights::GpuWeight::new(&self.shared.gpu, &source, self.weight_limit)?;
        let mut memory = self.shared.memory();
        Ok(memory.add_weight(weight, |id| source.handle(id)))
    }

    fn copies_weight(&self, _place: &Place) -> bool {
        true
    }

    fn random_weight(&mut self, weight: RandomWeight) -> Result<Weight> {
        weight.check("wgpu")?;
        let made = weights::GpuWeight::random(&self.shared, &weight, self.weight_limit)?;
        let mut memory = self.shared.memory();
        Ok(memory.add_weight(made, |id| weight.handle(id)))
    }

    fn memory(&self) -> MemoryUse {
        self.shared.memory().usage()
    }

    fn release(&mut self, weight: Weight) -> Result<()> {
        self.shared.memory().release(weight)
    }

    fn fill_states(&mut self, pool: &StatePool, random: Random) -> Result<()> {
        let layout = pool.layout;
        for layer in 0..layout.layers {
            let (states, conv_states) = self.shared.memory().states(pool, layer)?.clone();
            let rows = |len: usize| fill::Rows::plain(layout.slots * len);
            let [first, second] = [random.part(2 * layer), random.part(2 * layer + 1)];
            fill::fill(&self.shared, &states, &rows(layout.state_len()), first)?;
            fill::fill(
                &self.shared,
                &conv_states,
                &rows(layout.conv_state_len()),
                second,
            )?;
        }
        Ok(())
    }

    fn fill_latents(&mut self, pool: &LatentPool, random: Random) -> Result<()> {
        let layout = pool.layout;
        for layer in 0..layout.layers {
            let buffer = self.shared.memory().latents(pool, layer)?.clone();
            let packed = layout.dtype != Dtype::F32;
            let rows = fill::Rows {
                element: 0,
                rows: layout.blocks * layout.block_tokens,
                columns: layout.width(),
                stride: memory::row_bytes(&layout) / layout.dtype.size(),
                dtype: layout.dtype,
                packed,
            };
            fill::fill(&self.shared, &buffer, &rows, random.part(layer))?;
        }
        Ok(())
    }

    fn tensor(
        &mut self,
        rows: Rows,
        capacity: usize,
        width: usize,
        element: Element,
    ) -> Result<Tensor> {
        let mut memory = self.shared.memory();
        let make = memory::make(&self.shared.gpu);
        memory.add_tensor(&make, rows, capacity, width, element, 4)
    }

    fn write_tensor(&mut self, tensor: Tensor, values: &TensorValues) -> Result<()> {
        tensor.check_values(values)?;
        let buffer = self.shared.memory().tensor(tensor)?.clone();
        self.write("an activation", &buffer, 0, memory::bytes(values))
    }

    fn read_tensor(&mut self, tensor: Tensor, rows: usize) -> Ticket<TensorValues> {
        let read = || {
            tensor.check_rows(rows)?;
            let buffer = self.shared.memory().tensor(tensor)?.clone();
            self.read(&[(&buffer, 0, 4 * (rows * tensor.width) as u64)])
        };
        later(read(), move |words| {
            memory::values(tensor, bytemuck::cast_slice(&words))
        })
    }

    fn state_pool(&mut self, layout: StateLayout) -> Result<StatePool> {
        let make = memory::make(&self.shared.gpu);
        self.shared.memory().add_states(&make, layout)
    }

    fn latent_pool(&mut self, layout: LatentLayout) -> Result<LatentPool> {
        let make = memory::make(&self.shared.gpu);
        let row = memory::row_bytes(&layout);
        self.shared.memory().add_latents(&make, layout, row)
    }

    fn resize_states(&mut self, pool: &StatePool, slots: usize) -> Result<StatePool> {
        let gpu = &self.shared.gpu;
        let (make, copy) = (memory::make(gpu), memory::copy(gpu));
        let mut memory = self.shared.memory();
        memory.resize_states((&make, &copy), pool, slots)
    }

    fn resize_latents(&mut self, pool: &LatentPool, blocks: usize) -> Result<LatentPool> {
        let gpu = &self.shared.gpu;
        let (make, copy) = (memory::make(gpu), memory::copy(gpu));
        let row = memory::row_bytes(&pool.layout);
        let mut memory = self.shared.memory();
        memory.resize_latents((&make, &copy), pool, blocks, row)
    }

    fn release_states(&mut self, pool: StatePool) -> Result<()> {
        self.shared.memory().release_states(pool)
    }

    fn release_latents(&mut self, pool: LatentPool) -> Result<()> {
        self.shared.memory().release_latents(pool)
    }

    fn read_state(&mut self, pool: &StatePool, layer: usize, slot: Slot) -> Ticket<StateRecord> {
        let layout = pool.layout;
        let read = || {
            pool.check_slot(layer, slot)?;
            let (states, conv_states) = self.shared.memory().states(pool, layer)?.clone();
            let place = |len: usize| (4 * slot.0 as u64 * len as u64, 4 * len as u64);
            let (state, conv_state) = (place(layout.state_len()), place(layout.conv_state_len()));
            self.read(&[
                (&states, state.0, state.1),
                (&conv_states, conv_state.0, conv_state.1),
            ])
        };
        later(read(), move |words| {
            let mut state = bytemuck::cast_vec(words);
            let conv_state = state.split_off(layout.state_len());
            StateRecord::new(&layout, state, conv_state)
        })
    }

    fn write_state(
        &mut self,
        pool: &StatePool,
        layer: usize,
        slot: Slot,
        record: &StateRecord,
    ) -> Result<()> {
        pool.check_slot(layer, slot)?;
        pool.check_record(record)?;
        let (states, conv_states) = self.shared.memory().states(pool, layer)?.clone();
        let place = |len: usize| 4 * u64::from(slot.0) * len as u64;
        let state = record.key_value();
        let at = place(pool.layout.state_len());
        self.write("a state", &states, at, bytemuck::cast_slice(&state))?;
        let at = place(pool.layout.conv_state_len());
        self.write(
            "a convolution state",
            &conv_states,
            at,
            bytemuck::cast_slice(&record.conv_state),
        )
    }

    fn read_latents(
        &mut self,
        pool: &LatentPool,
        layer: usize,
        block: Block,
        tokens: usize,
    ) -> Ticket<LatentRecord> {
        let layout = pool.layout;
        let read = || {
            pool.check_rows(layer, block, tokens)?;
            let buffer = self.shared.memory().latents(pool, layer)?.clone();
            let row = memory::row_bytes(&layout) as u64;
            let first = u64::from(block.0) * layout.block_tokens as u64 * row;
            self.read(&[(&buffer, first, tokens as u64 * row)])
        };
        later(read(), move |words| {
            let rows = memory::unpadded(&layout, bytemuck::cast_slice(&words));
            LatentRecord::new(&layout, rows)
        })
    }

    fn write_latents(
        &mut self,
        pool: &LatentPool,
        layer: usize,
        block: Block,
        record: &LatentRecord,
    ) -> Result<()> {
        let tokens = pool.check_record(record)?;
        pool.check_rows(layer, block, tokens)?;
        let buffer = self.shared.memory().latents(pool, layer)?.clone();
        let layout = &pool.layout;
        let block_bytes = (layout.block_tokens * memory::row_bytes(layout)) as u64;
        let at = u64::from(block.0) * block_bytes;
        let rows = record.bytes(layout.dtype);
        self.write("latents", &buffer, at, &memory::padded(layout, &rows))
    }

    fn compile(&mut self, program: &Program, capacity: Capacity) -> Result<Box<dyn Step>> {
        let demands = check::program(program, &capacity, 1)?;
        let uses = self.shared.memory().check(&program.expanded(|_| false))?;
        let mut step = step::WgpuStep::new(Arc::clone(&self.shared), capacity, demands, uses)?;
        let program = program.joined().expanded(step::WgpuStep::takes);
        program.ops.iter().try_for_each(|op| step.push(op))?;
        Ok(Box::new(step))
    }

    fn report_confirmed(&mut self, report: ConfirmedReport) {
        self.shared.gpu.report_settled(report);
    }
}
