//! A backend without a device: it creates handles and checks programs, but has no memory and executes no step.
//!
//! It is used to build, check and print a model's program without weights and without a device.

use std::sync::{Arc, Mutex, PoisonError};

use super::{
    Backend, Batch, Block, Capacity, Device, Element, LatentLayout, LatentPool, LatentRecord,
    Program, RandomWeight, Result, Rows, Slot, StateLayout, StatePool, StateRecord, Step,
    StepOutput, Tensor, TensorValues, Ticket, Weight, WeightSource, check,
};
use crate::config::Dtype;
use crate::error::BackendError;

/// The memory in bytes that a device would have used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Used {
    /// Weights: those of random numbers in the dtypes of an unquantised model.
    pub weights: u64,
    /// KDA states and convolution states.
    pub states: u64,
    /// Latents.
    pub latents: u64,
    /// Activations, in f32.
    pub activations: u64,
}

/// Creates handles.
pub struct DryBackend {
    device: Device,
    weights: usize,
    tensors: usize,
    pools: usize,
    used: Arc<Mutex<Used>>,
}

impl DryBackend {
    /// A backend for one rank that has the whole model.
    #[must_use]
    pub fn new() -> Self {
        Self {
            device: Device {
                backend: "dry",
                index: 0,
                name: "no device".to_owned(),
                memory_bytes: None,
                precision: Dtype::Bf16,
                cache: Dtype::Bf16,
            },
            weights: 0,
            tensors: 0,
            pools: 0,
            used: Arc::default(),
        }
    }

    /// What its memory would have been used for so far, and is later.
    #[must_use]
    pub fn used(&self) -> Arc<Mutex<Used>> {
        Arc::clone(&self.used)
    }

    fn count(&self, add: impl FnOnce(&mut Used)) {
        add(&mut self.used.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Default for DryBackend {
    fn default() -> Self {
        Self::new()
    }
}

/// The next id.
fn next(count: &mut usize) -> usize {
    let id = *count;
    *count += 1;
    id
}

fn no_memory(what: &str) -> BackendError {
    BackendError::Unsupported {
        backend: "dry",
        what: format!("{what}: it has no memory"),
    }
}

impl Backend for DryBackend {
    fn device(&self) -> &Device {
        &self.device
    }

    fn weight(&mut self, source: WeightSource) -> Result<Weight> {
        let bytes: usize = source.parts.iter().map(|part| part.bytes.len()).sum();
        self.count(|used| used.weights += bytes as u64);
        Ok(source.handle(next(&mut self.weights)))
    }

    fn random_weight(&mut self, weight: RandomWeight) -> Result<Weight> {
        let bytes = weight
            .format
            .bytes(1, weight.elements())
            .unwrap_or_default();
        self.count(|used| used.weights += bytes as u64);
        Ok(weight.handle(next(&mut self.weights)))
    }

    fn tensor(
        &mut self,
        rows: Rows,
        capacity: usize,
        width: usize,
        element: Element,
    ) -> Result<Tensor> {
        self.count(|used| used.activations += 4 * (capacity * width) as u64);
        Ok(Tensor {
            id: next(&mut self.tensors),
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
        let id = next(&mut self.pools);
        self.count(|used| used.states += layout.bytes());
        Ok(StatePool { id, layout })
    }

    fn latent_pool(&mut self, layout: LatentLayout) -> Result<LatentPool> {
        let id = next(&mut self.pools);
        let bytes = layout.len() * layout.dtype.size();
        self.count(|used| used.latents += bytes as u64);
        Ok(LatentPool { id, layout })
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
