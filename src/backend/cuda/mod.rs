//! The CUDA backend: every operation as a kernel of `kernels/`, dense products by cuBLASLt, on NVIDIA GPUs.
//!
//! bf16 weights and activations, by default a bf16 latent cache; f32 sums, states, gates, softmax and router. A [`Machine`]
//! runs the kernels. A step becomes one list of commands per submission, of which the driver keeps a graph. A device that has joined
//! others exchanges results with them in this list.

mod answers;
mod attention;
mod collectives;
pub mod driver;
mod experts;
mod fill;
mod kda;
pub mod kernels;
pub mod machine;
mod memory;
mod operations;
mod params;
mod products;
mod recurrence;
mod sample;
mod step;
mod trace;
mod weights;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::machine::{Machine, Place, Work};
use self::memory::Memory;
use super::check;
use super::gpu::later;
use super::{
    Backend, Block, Capacity, CollectiveId, Collectives, Device, Element, LatentLayout, LatentPool,
    LatentRecord, Leave, MemoryUse, Program, Random, RandomWeight, Result, Rows, Slot, StateLayout,
    StatePool, StateRecord, Step, Tensor, TensorValues, Ticket, Weight, WeightSource,
};
use crate::checkpoint::Format;

/// State that backend and steps share.
struct Shared {
    machine: Arc<dyn Machine>,
    memory: Mutex<Memory>,
    /// The number of devices that exchange results, this one included.
    ranks: AtomicUsize,
}

impl Shared {
    fn ranks(&self) -> usize {
        self.ranks.load(Ordering::Relaxed)
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        // Handles are added as a whole, so a panic elsewhere leaves the tables consistent.
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Overwrites memory.
    fn write(&self, to: &Place, bytes: &[u8]) -> Result<()> {
        let start = to.range().start as u64;
        self.machine.write(to.buffer(), start, bytes)
    }

    /// Reads memory; the results are concatenated.
    fn read(&self, answers: &[Place]) -> Result<Ticket<Vec<u8>>> {
        let ticket = self.machine.submit(&Work {
            step: machine::NO_STEP,
            upload: None,
            commands: &[],
            timed: None,
            answers,
        })?;
        Ok(Ticket::new(async move { Ok(ticket.await?.bytes) }))
    }
}

/// One device and its memory.
pub struct CudaBackend {
    shared: Arc<Shared>,
}

impl CudaBackend {
    /// Opens device `index` of NVIDIA's driver, by default the first.
    ///
    /// # Errors
    /// No driver, no such device, one that is too old, or a library that is missing.
    pub fn open(index: Option<usize>) -> Result<Self> {
        Ok(Self::over(Arc::new(driver::Driver::open(index)?)))
    }

    /// A backend on a machine.
    #[must_use]
    pub fn over(machine: Arc<dyn Machine>) -> Self {
        let memory = Mutex::new(Memory::new("cuda"));
        Self {
            shared: Arc::new(Shared {
                machine,
                memory,
                ranks: AtomicUsize::new(1),
            }),
        }
    }
}

impl Backend for CudaBackend {
    fn device(&self) -> &Device {
        self.shared.machine.device()
    }

    fn is_asynchronous(&self) -> bool {
        true
    }

    fn recover(&mut self) -> Result<()> {
        // A device that is lost does not come back, and says so.
        self.shared.read(&[])?.wait().map(drop)
    }

    fn free_memory(&mut self) -> Option<u64> {
        self.shared.machine.free_memory()
    }

    fn weight(&mut self, source: WeightSource) -> Result<Weight> {
        let weight = weights::DeviceWeight::new(&self.shared.machine, &source)?;
        let mut memory = self.shared.memory();
        Ok(memory.add_weight(weight, |id| source.handle(id)))
    }

    fn copies_weight(&self, _place: &super::Place) -> bool {
        true
    }

    fn random_weight(&mut self, weight: RandomWeight) -> Result<Weight> {
        let made = weights::DeviceWeight::random(&self.shared.machine, &weight)?;
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
        for layer in 0..pool.layout.layers {
            let (states, conv_states) = self.shared.memory().states(pool, layer)?.clone();
            let machine = &self.shared.machine;
            fill::fill(machine, &states, Format::F32, random.part(2 * layer))?;
            fill::fill(
                machine,
                &conv_states,
                Format::F32,
                random.part(2 * layer + 1),
            )?;
        }
        Ok(())
    }

    fn fill_latents(&mut self, pool: &LatentPool, random: Random) -> Result<()> {
        for layer in 0..pool.layout.layers {
            let rows = Arc::clone(self.shared.memory().latents(pool, layer)?);
            fill::fill(
                &self.shared.machine,
                &rows,
                Format::Dense(pool.layout.dtype),
                random.part(layer),
            )?;
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
        let make = memory::make(&self.shared.machine);
        let mut memory = self.shared.memory();
        let bytes = memory::size(element);
        memory.add_tensor(&make, rows, capacity, width, element, bytes)
    }

    fn write_tensor(&mut self, tensor: Tensor, values: &TensorValues) -> Result<()> {
        tensor.check_values(values)?;
        let buffer = Arc::clone(self.shared.memory().tensor(tensor)?);
        let bytes = memory::bytes(tensor.element, values);
        self.shared.machine.write(&buffer, 0, &bytes)
    }

    fn read_tensor(&mut self, tensor: Tensor, rows: usize) -> Ticket<TensorValues> {
        let read = || {
            tensor.check_rows(rows)?;
            let bytes = memory::size(tensor.element) * (rows * tensor.width) as u64;
            let place = Place::new(self.shared.memory().tensor(tensor)?, 0, bytes)?;
            self.shared.read(&[place])
        };
        later(read(), move |bytes| memory::values(tensor, &bytes))
    }

    fn state_pool(&mut self, layout: StateLayout) -> Result<StatePool> {
        let make = memory::make(&self.shared.machine);
        self.shared.memory().add_states(&make, layout)
    }

    fn latent_pool(&mut self, layout: LatentLayout) -> Result<LatentPool> {
        let make = memory::make(&self.shared.machine);
        let row = layout.width() * layout.dtype.size();
        self.shared.memory().add_latents(&make, layout, row)
    }

    fn resize_states(&mut self, pool: &StatePool, slots: usize) -> Result<StatePool> {
        let machine = &self.shared.machine;
        let (make, copy) = (memory::make(machine), memory::copy(machine));
        let mut memory = self.shared.memory();
        memory.resize_states((&make, &copy), pool, slots)
    }

    fn resize_latents(&mut self, pool: &LatentPool, blocks: usize) -> Result<LatentPool> {
        let machine = &self.shared.machine;
        let (make, copy) = (memory::make(machine), memory::copy(machine));
        let row = pool.layout.width() * pool.layout.dtype.size();
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
            self.shared.read(&self.places(pool, layer, slot)?)
        };
        later(read(), move |bytes| {
            let (state, conv_state) = bytes.split_at(4 * layout.state_len());
            let [state, conv_state] = [state, conv_state].map(bytemuck::pod_collect_to_vec);
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
        let [state, conv_state] = self.places(pool, layer, slot)?;
        let key_value = record.key_value();
        self.shared
            .write(&state, bytemuck::cast_slice(&key_value))?;
        let words = bytemuck::cast_slice(&record.conv_state);
        self.shared.write(&conv_state, words)
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
            self.shared.read(&[self.rows(pool, layer, block, tokens)?])
        };
        later(read(), move |bytes| LatentRecord::new(&layout, bytes))
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
        let place = self.rows(pool, layer, block, tokens)?;
        self.shared.write(&place, &record.bytes(pool.layout.dtype))
    }

    fn compile(&mut self, program: &Program, capacity: Capacity) -> Result<Box<dyn Step>> {
        let demands = check::program(program, &capacity, self.shared.ranks())?;
        let uses = self.shared.memory().check(&program.expanded(|_| false))?;
        let mut step = step::CudaStep::new(Arc::clone(&self.shared), capacity, demands, uses)?;
        let program = program.joined().expanded(|op| step.takes(op));
        step.push_all(&program.ops)?;
        Ok(Box::new(step))
    }

    fn collectives(&mut self) -> Result<Collectives> {
        Ok(self.shared.machine.collectives())
    }

    fn collective_id(&mut self) -> Result<CollectiveId> {
        self.shared.machine.collective_id()
    }

    fn join(&mut self, id: CollectiveId, rank: usize, ranks: usize) -> Result<Leave> {
        self.shared.machine.join(id, rank, ranks)?;
        self.shared.ranks.store(ranks, Ordering::Relaxed);
        let machine = Arc::clone(&self.shared.machine);
        Ok(Arc::new(move || machine.leave()))
    }
}

impl CudaBackend {
    /// The memory of a slot's state and convolution state of one layer.
    fn places(&self, pool: &StatePool, layer: usize, slot: Slot) -> Result<[Place; 2]> {
        let memory = self.shared.memory();
        let (states, conv_states) = memory.states(pool, layer)?;
        let place = |buffer, len: usize| {
            let bytes = 4 * len as u64;
            Place::new(buffer, u64::from(slot.0) * bytes, bytes)
        };
        Ok([
            place(states, pool.layout.state_len())?,
            place(conv_states, pool.layout.conv_state_len())?,
        ])
    }

    /// The memory of the first rows of a block of one layer.
    fn rows(&self, pool: &LatentPool, layer: usize, block: Block, tokens: usize) -> Result<Place> {
        let row = pool.layout.width() * pool.layout.dtype.size();
        let bytes = |tokens: usize| (tokens * row) as u64;
        let start = u64::from(block.0) * bytes(pool.layout.block_tokens);
        let memory = self.shared.memory();
        Place::new(memory.latents(pool, layer)?, start, bytes(tokens))
    }
}
