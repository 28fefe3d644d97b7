//! A backend without a device: it creates handles and checks programs, but has no memory and executes no step.
//!
//! It is used to build, check and print a model's program without weights and without a device.

use std::sync::{Arc, Mutex, PoisonError};

use super::handles::Table;
use super::{
    Backend, Batch, Block, Capacity, Device, Element, LatentLayout, LatentPool, LatentRecord,
    MemoryUse, Program, RandomWeight, Result, Rows, Slot, StateLayout, StatePool, StateRecord,
    Step, StepOutput, Tensor, TensorValues, Ticket, Weight, WeightSource, check,
};
use crate::config::Dtype;
use crate::error::BackendError;

/// Its name.
const NAME: &str = "dry";

/// Creates handles.
pub struct DryBackend {
    device: Device,
    /// Bytes of each weight.
    weights: Table<Weight, u64>,
    states: Table<StatePool, ()>,
    latents: Table<LatentPool, ()>,
    tensors: usize,
    used: Arc<Mutex<MemoryUse>>,
}

impl DryBackend {
    /// A backend for one rank that has the whole model.
    #[must_use]
    pub fn new() -> Self {
        Self {
            device: Device {
                backend: NAME,
                index: 0,
                name: "no device".to_owned(),
                memory_bytes: None,
                precision: Dtype::Bf16,
                cache: Dtype::Bf16,
            },
            weights: Table::default(),
            states: Table::default(),
            latents: Table::default(),
            tensors: 0,
            used: Arc::default(),
        }
    }

    /// What the memory of a device would be used for; it is counted on as handles are made and released.
    #[must_use]
    pub fn used(&self) -> Arc<Mutex<MemoryUse>> {
        Arc::clone(&self.used)
    }

    fn add_weight(&mut self, bytes: usize, handle: impl FnOnce(usize) -> Weight) -> Weight {
        self.count(|used| used.weights += bytes as u64);
        self.weights.add(bytes as u64, handle)
    }

    fn count(&self, add: impl FnOnce(&mut MemoryUse)) {
        add(&mut self.used.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Default for DryBackend {
    fn default() -> Self {
        Self::new()
    }
}

fn no_memory(what: &str) -> BackendError {
    BackendError::Unsupported {
        backend: NAME,
        what: format!("{what}: it has no memory"),
    }
}

impl Backend for DryBackend {
    fn device(&self) -> &Device {
        &self.device
    }

    fn weight(&mut self, source: WeightSource) -> Result<Weight> {
        let bytes: usize = source.parts.iter().map(|part| part.bytes.len()).sum();
        Ok(self.add_weight(bytes, |id| source.handle(id)))
    }

    fn random_weight(&mut self, weight: RandomWeight) -> Result<Weight> {
        let bytes = weight
            .format
            .bytes(1, weight.elements())
            .unwrap_or_default();
        Ok(self.add_weight(bytes, |id| weight.handle(id)))
    }

    fn memory(&self) -> MemoryUse {
        *self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn release(&mut self, weight: Weight) -> Result<()> {
        let bytes = *self.weights.get(NAME, weight)?;
        self.weights.release(NAME, weight)?;
        self.count(|used| used.weights -= bytes);
        Ok(())
    }

    fn tensor(
        &mut self,
        rows: Rows,
        capacity: usize,
        width: usize,
        element: Element,
    ) -> Result<Tensor> {
        let id = self.tensors;
        self.tensors += 1;
        self.count(|used| used.activations += 4 * (capacity * width) as u64);
        Ok(Tensor {
            id,
            rows,
            capacity,
            width,
            element,
        })
    }

    fn write_tensor(&mut self, _: Tensor, _: &TensorValues) -> Result<()> {
        Err(no_memory("a tensor's values"))
    }

    fn read_tensor(&mut self, _: Tensor, _: usize) -> Ticket<TensorValues> {
        Ticket::ready(Err(no_memory("a tensor's values")))
    }

    fn state_pool(&mut self, layout: StateLayout) -> Result<StatePool> {
        self.count(|used| used.states += layout.bytes());
        Ok(self.states.add((), |id| StatePool { id, layout }))
    }

    fn latent_pool(&mut self, layout: LatentLayout) -> Result<LatentPool> {
        self.count(|used| used.latents += layout.bytes());
        Ok(self.latents.add((), |id| LatentPool { id, layout }))
    }

    fn resize_states(&mut self, pool: &StatePool, slots: usize) -> Result<StatePool> {
        self.states.check(NAME, *pool)?;
        let to = pool.resized(slots);
        self.states.change(to);
        let [old, new] = [pool, &to].map(|pool| pool.layout.bytes());
        self.count(|used| used.states = used.states - old + new);
        Ok(to)
    }

    fn resize_latents(&mut self, pool: &LatentPool, blocks: usize) -> Result<LatentPool> {
        self.latents.check(NAME, *pool)?;
        let to = pool.resized(blocks);
        self.latents.change(to);
        let [old, new] = [pool, &to].map(|pool| pool.layout.bytes());
        self.count(|used| used.latents = used.latents - old + new);
        Ok(to)
    }

    fn release_states(&mut self, pool: StatePool) -> Result<()> {
        self.states.release(NAME, pool)?;
        self.count(|used| used.states -= pool.layout.bytes());
        Ok(())
    }

    fn release_latents(&mut self, pool: LatentPool) -> Result<()> {
        self.latents.release(NAME, pool)?;
        self.count(|used| used.latents -= pool.layout.bytes());
        Ok(())
    }

    fn read_state(&mut self, _: &StatePool, _: usize, _: Slot) -> Ticket<StateRecord> {
        Ticket::ready(Err(no_memory("a state")))
    }

    fn write_state(&mut self, _: &StatePool, _: usize, _: Slot, _: &StateRecord) -> Result<()> {
        Err(no_memory("a state"))
    }

    fn read_latents(
        &mut self,
        _: &LatentPool,
        _: usize,
        _: Block,
        _: usize,
    ) -> Ticket<LatentRecord> {
        Ticket::ready(Err(no_memory("latents")))
    }

    fn write_latents(
        &mut self,
        _: &LatentPool,
        _: usize,
        _: Block,
        _: &LatentRecord,
    ) -> Result<()> {
        Err(no_memory("latents"))
    }

    fn compile(&mut self, program: &Program, capacity: Capacity) -> Result<Box<dyn Step>> {
        check::program(program, &capacity, 1)?;
        let names = program.ops.iter().map(super::Op::name).collect();
        Ok(Box::new(DryStep(names)))
    }
}

/// The names of a program's operations.
struct DryStep(Vec<&'static str>);

impl Step for DryStep {
    fn operations(&self) -> &[&'static str] {
        &self.0
    }

    fn time(&mut self, _: bool) -> Result<()> {
        Err(no_memory("times"))
    }

    fn submit(&mut self, _: &Batch) -> Result<Ticket<StepOutput>> {
        Err(no_memory("a batch"))
    }
}
