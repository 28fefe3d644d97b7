//! The CPU backend: plain f32 arithmetic in Rust, one file per operation; also the fallback without a GPU.
//!
//! It is tested like the other backends and is not their oracle, which is f64 code in `conformance`. Weights stay in the
//! mapped checkpoint and are widened a few rows at a time.

mod embed;
mod experts;
mod fill;
mod gated_norm;
mod kda_chunk;
mod kda_gates;
mod kda_recurrence;
mod kda_step;
mod latents;
mod linear;
mod math;
mod memory;
mod mla;
mod mla_append;
mod mla_decode;
mod mla_prefill;
mod quantised;
mod rms_norm;
mod route;
mod sample;
mod select;
mod short_conv;
mod step;
mod swiglu;
mod trace;
mod traced;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::latents::Latents;
use self::memory::{Memory, States};
use super::{
    Backend, Block, Capacity, Device, Element, LatentLayout, LatentPool, LatentRecord, MemoryUse,
    Program, Random, RandomWeight, Result, Rows, Slot, StateLayout, StatePool, StateRecord, Step,
    Tensor, TensorValues, Ticket, Weight, WeightSource,
};
use super::{check, host};
use crate::config::Dtype;

/// This machine's CPU and memory.
pub struct CpuBackend {
    device: Device,
    memory: Arc<Mutex<Memory>>,
}

impl CpuBackend {
    /// The whole machine.
    #[must_use]
    pub fn new() -> Self {
        Self {
            device: describe(),
            memory: Arc::new(Mutex::new(Memory::new("cpu"))),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Memory> {
        // A panic while the lock was held can only be a bug in an operation, whose output is undefined anyway.
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for CpuBackend {
    fn default() -> Self {
        Self::new()
    }
}

/// The CPU's name, its number of threads and the machine's memory.
#[must_use]
pub fn describe() -> Device {
    let brand = host::cpu();
    let threads = rayon::current_num_threads();
    Device {
        backend: "cpu",
        index: 0,
        name: format!(
            "{brand}, {threads} thread{}",
            if threads == 1 { "" } else { "s" }
        ),
        memory_bytes: host::memory(),
        precision: Dtype::F32,
        cache: Dtype::F32,
    }
}

impl Backend for CpuBackend {
    fn device(&self) -> &Device {
        &self.device
    }

    fn weight(&mut self, source: WeightSource) -> Result<Weight> {
        self.lock().add_weight(source)
    }

    fn random_weight(&mut self, weight: RandomWeight) -> Result<Weight> {
        let source = fill::weight(weight)?;
        self.lock().add_weight(source)
    }

    fn memory(&self) -> MemoryUse {
        self.lock().usage()
    }

    fn release(&mut self, weight: Weight) -> Result<()> {
        self.lock().weights.release("cpu", weight)
    }

    fn fill_states(&mut self, pool: &StatePool, random: Random) -> Result<()> {
        fill::states(self.lock().states.get_mut("cpu", *pool)?, random);
        Ok(())
    }

    fn fill_latents(&mut self, pool: &LatentPool, random: Random) -> Result<()> {
        fill::latents(self.lock().latents.get_mut("cpu", *pool)?, random);
        Ok(())
    }

    fn tensor(
        &mut self,
        rows: Rows,
        capacity: usize,
        width: usize,
        element: Element,
    ) -> Result<Tensor> {
        self.lock().add_tensor(rows, capacity, width, element)
    }

    fn write_tensor(&mut self, tensor: Tensor, values: &TensorValues) -> Result<()> {
        self.lock().write(tensor, values)
    }

    fn read_tensor(&mut self, tensor: Tensor, rows: usize) -> Ticket<TensorValues> {
        Ticket::ready(self.lock().read(tensor, rows))
    }

    fn state_pool(&mut self, layout: StateLayout) -> Result<StatePool> {
        let (states, mut memory) = (States::new(layout)?, self.lock());
        Ok(memory.states.add(states, |id| StatePool { id, layout }))
    }

    fn latent_pool(&mut self, layout: LatentLayout) -> Result<LatentPool> {
        let (latents, mut memory) = (Latents::new(layout)?, self.lock());
        Ok(memory.latents.add(latents, |id| LatentPool { id, layout }))
    }

    fn resize_states(&mut self, pool: &StatePool, slots: usize) -> Result<StatePool> {
        let mut memory = self.lock();
        let states = memory.states.get_mut("cpu", *pool)?;
        *states = states.resized(slots)?;
        let to = pool.resized(slots);
        memory.states.change(to);
        Ok(to)
    }

    fn resize_latents(&mut self, pool: &LatentPool, blocks: usize) -> Result<LatentPool> {
        let mut memory = self.lock();
        let latents = memory.latents.get_mut("cpu", *pool)?;
        *latents = latents.resized(blocks)?;
        let to = pool.resized(blocks);
        memory.latents.change(to);
        Ok(to)
    }

    fn release_states(&mut self, pool: StatePool) -> Result<()> {
        self.lock().states.release("cpu", pool)
    }

    fn release_latents(&mut self, pool: LatentPool) -> Result<()> {
        self.lock().latents.release("cpu", pool)
    }

    fn read_state(&mut self, pool: &StatePool, layer: usize, slot: Slot) -> Ticket<StateRecord> {
        let read = || {
            pool.check_slot(layer, slot)?;
            let memory = self.lock();
            let states = memory.states.get("cpu", *pool)?;
            let state = states.state(layer, slot).to_vec();
            let conv_state = states.conv_state(layer, slot).to_vec();
            Ok(StateRecord::new(&pool.layout, state, conv_state))
        };
        Ticket::ready(read())
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
        let state = record.key_value();
        let mut memory = self.lock();
        let states = memory.states.get_mut("cpu", *pool)?;
        states.state_mut(layer, slot).copy_from_slice(&state);
        states
            .conv_state_mut(layer, slot)
            .copy_from_slice(&record.conv_state);
        Ok(())
    }

    fn read_latents(
        &mut self,
        pool: &LatentPool,
        layer: usize,
        block: Block,
        tokens: usize,
    ) -> Ticket<LatentRecord> {
        let read = || {
            pool.check_rows(layer, block, tokens)?;
            let memory = self.lock();
            let latents = memory.latents.get("cpu", *pool)?;
            let rows = latents.bytes(layer, block, tokens).to_vec();
            Ok(LatentRecord::new(&pool.layout, rows))
        };
        Ticket::ready(read())
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
        let mut memory = self.lock();
        let latents = memory.latents.get_mut("cpu", *pool)?;
        let rows = latents.bytes_mut(layer, block, tokens);
        rows.copy_from_slice(&record.bytes(pool.layout.dtype));
        Ok(())
    }

    fn compile(&mut self, program: &Program, capacity: Capacity) -> Result<Box<dyn Step>> {
        let demands = check::program(program, &capacity, 1)?;
        let program = program.expanded(|_| false);
        let uses = self.lock().check(&program)?;
        let memory = Arc::clone(&self.memory);
        let mut step = step::CpuStep::new(memory, capacity, demands, uses);
        program.ops.iter().for_each(|op| step.push(op));
        Ok(Box::new(step))
    }
}
