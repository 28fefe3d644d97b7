//! A device of a replica, as the replica of another process uses it.
//!
//! It has the weights of this process' store, each once, whoever uses them. What a loan has made is freed with it, except tensors:
//! these are kept for the next loan, since no backend frees them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::Replicas;
use super::store::{Held, hold_on};
use crate::backend::parts::step::StepOn;
use crate::backend::shared::SharedBackend;
use crate::backend::{
    Backend, Batch, Block, Capacity, Device, Element, LatentLayout, LatentPool, LatentRecord,
    MemoryUse, Place, Program, Random, Result, Rows, Slot, StateLayout, StatePool, StateRecord,
    Step, StepOutput, Tensor, TensorValues, Ticket, Weight, WeightSource,
};
use crate::error::BackendError;

/// A device that is lent.
pub(crate) struct Lent {
    replicas: Arc<Replicas>,
    device: usize,
    description: Device,
    /// Tensors of loans that have ended.
    spare: Mutex<Vec<Tensor>>,
}

impl Lent {
    pub(crate) fn new(replicas: &Arc<Replicas>, device: usize) -> Arc<Self> {
        Arc::new(Self {
            replicas: Arc::clone(replicas),
            device,
            description: replicas.descriptions[device].clone(),
            spare: Mutex::default(),
        })
    }

    /// The device for one user, who has nothing on it yet.
    pub(crate) fn loan(self: &Arc<Self>) -> Loan {
        Loan {
            lent: Arc::clone(self),
            weights: HashMap::new(),
            tensors: Vec::new(),
            states: Vec::new(),
            latents: Vec::new(),
        }
    }

    fn shared(&self) -> &SharedBackend {
        &self.replicas.devices[self.device]
    }

    /// A call of the device, alone on it.
    fn call<T>(&self, call: impl FnOnce(&mut dyn Backend) -> Result<T>) -> Result<T> {
        let called = call(&mut **self.shared().lock());
        self.shared().noted(called)
    }

    /// A call whose result comes later.
    fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&mut dyn Backend) -> Ticket<T>,
    ) -> Ticket<T> {
        let ticket = read(&mut **self.shared().lock());
        let shared = self.shared().clone();
        Ticket::new(async move { shared.noted(ticket.await) })
    }
}

/// What one user has on a lent device. Its calls name only what it has made or was lent; programs are checked by the device alone.
pub(crate) struct Loan {
    lent: Arc<Lent>,
    /// By the number of their handles.
    weights: HashMap<usize, Vec<Held>>,
    tensors: Vec<Tensor>,
    states: Vec<StatePool>,
    latents: Vec<LatentPool>,
}

impl Loan {
    /// A use of a weight that this process has loaded, or of a part of its experts.
    ///
    /// # Errors
    /// Another model, and those of the device.
    pub(crate) fn lend(
        &mut self,
        name: &str,
        tensors: &[String],
        place: Place,
        shape: [usize; 3],
    ) -> Result<Weight> {
        let Lent {
            replicas, device, ..
        } = &*self.lent;
        let entry = replicas.store.named(name, tensors, place, shape)?;
        let held = hold_on(&entry, *device, place.shard, &replicas.devices)?;
        let weight = held.weight;
        self.weights.entry(weight.id).or_default().push(held);
        Ok(weight)
    }
}

/// Fails for what this loan does not have.
fn owned<T: PartialEq>(all: &[T], one: &T) -> Result<usize> {
    all.iter()
        .position(|it| it == one)
        .ok_or_else(|| unsupported("something that it has not made"))
}

fn unsupported(what: &str) -> BackendError {
    BackendError::Unsupported {
        backend: "lent",
        what: what.to_owned(),
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        let lent = &self.lent;
        let spare = lent.spare.lock();
        spare
            .unwrap_or_else(PoisonError::into_inner)
            .append(&mut self.tensors);
        if lent.shared().is_lost() {
            return;
        }
        let states = self.states.drain(..);
        let states = states.map(|pool| lent.call(|device| device.release_states(pool)));
        let latents = self.latents.drain(..);
        let latents = latents.map(|pool| lent.call(|device| device.release_latents(pool)));
        for error in states.chain(latents).filter_map(Result::err) {
            tracing::warn!("a lent device does not free a pool: {error}");
        }
    }
}

impl Backend for Loan {
    fn device(&self) -> &Device {
        &self.lent.description
    }

    /// Whether the device is there, of which this process takes care itself.
    fn recover(&mut self) -> Result<()> {
        match self.lent.shared().is_lost() {
            true => Err(BackendError::Lost {
                backend: "lent",
                reason: "the device has failed".to_owned(),
            }),
            false => Ok(()),
        }
    }

    fn memory(&self) -> MemoryUse {
        self.lent.replicas.memory(self.lent.device)
    }

    fn weight(&mut self, _source: WeightSource) -> Result<Weight> {
        Err(unsupported("weights of other processes"))
    }

    fn release(&mut self, weight: Weight) -> Result<()> {
        let held = self.weights.get_mut(&weight.id).and_then(Vec::pop);
        let held = held.ok_or_else(|| unsupported("a weight that it does not use"))?;
        drop(held);
        Ok(())
    }

    fn fill_states(&mut self, pool: &StatePool, random: Random) -> Result<()> {
        owned(&self.states, pool)?;
        self.lent.call(|device| device.fill_states(pool, random))
    }

    fn fill_latents(&mut self, pool: &LatentPool, random: Random) -> Result<()> {
        owned(&self.latents, pool)?;
        self.lent.call(|device| device.fill_latents(pool, random))
    }

    fn tensor(
        &mut self,
        rows: Rows,
        capacity: usize,
        width: usize,
        element: Element,
    ) -> Result<Tensor> {
        let spare = {
            let spare = self.lent.spare.lock();
            let mut spare = spare.unwrap_or_else(PoisonError::into_inner);
            let fits = |it: &Tensor| {
                (it.rows, it.capacity, it.width, it.element) == (rows, capacity, width, element)
            };
            let found = spare.iter().position(fits);
            found.map(|index| spare.swap_remove(index))
        };
        let tensor = match spare {
            Some(tensor) => tensor,
            None => self
                .lent
                .call(|device| device.tensor(rows, capacity, width, element))?,
        };
        self.tensors.push(tensor);
        Ok(tensor)
    }

    fn write_tensor(&mut self, tensor: Tensor, values: &TensorValues) -> Result<()> {
        owned(&self.tensors, &tensor)?;
        self.lent.call(|device| device.write_tensor(tensor, values))
    }

    fn read_tensor(&mut self, tensor: Tensor, rows: usize) -> Ticket<TensorValues> {
        match owned(&self.tensors, &tensor) {
            Ok(_) => self.lent.read(|device| device.read_tensor(tensor, rows)),
            Err(error) => Ticket::ready(Err(error)),
        }
    }

    fn state_pool(&mut self, layout: StateLayout) -> Result<StatePool> {
        let pool = self.lent.call(|device| device.state_pool(layout))?;
        self.states.push(pool);
        Ok(pool)
    }

    fn latent_pool(&mut self, layout: LatentLayout) -> Result<LatentPool> {
        let pool = self.lent.call(|device| device.latent_pool(layout))?;
        self.latents.push(pool);
        Ok(pool)
    }

    fn resize_states(&mut self, pool: &StatePool, slots: usize) -> Result<StatePool> {
        let index = owned(&self.states, pool)?;
        let resized = self.lent.call(|device| device.resize_states(pool, slots))?;
        self.states[index] = resized;
        Ok(resized)
    }

    fn resize_latents(&mut self, pool: &LatentPool, blocks: usize) -> Result<LatentPool> {
        let index = owned(&self.latents, pool)?;
        let resized = self
            .lent
            .call(|device| device.resize_latents(pool, blocks))?;
        self.latents[index] = resized;
        Ok(resized)
    }

    fn release_states(&mut self, pool: StatePool) -> Result<()> {
        let index = owned(&self.states, &pool)?;
        self.states.swap_remove(index);
        self.lent.call(|device| device.release_states(pool))
    }

    fn release_latents(&mut self, pool: LatentPool) -> Result<()> {
        let index = owned(&self.latents, &pool)?;
        self.latents.swap_remove(index);
        self.lent.call(|device| device.release_latents(pool))
    }

    fn read_state(&mut self, pool: &StatePool, layer: usize, slot: Slot) -> Ticket<StateRecord> {
        match owned(&self.states, pool) {
            Ok(_) => self
                .lent
                .read(|device| device.read_state(pool, layer, slot)),
            Err(error) => Ticket::ready(Err(error)),
        }
    }

    fn write_state(
        &mut self,
        pool: &StatePool,
        layer: usize,
        slot: Slot,
        record: &StateRecord,
    ) -> Result<()> {
        owned(&self.states, pool)?;
        self.lent
            .call(|device| device.write_state(pool, layer, slot, record))
    }

    fn read_latents(
        &mut self,
        pool: &LatentPool,
        layer: usize,
        block: Block,
        tokens: usize,
    ) -> Ticket<LatentRecord> {
        match owned(&self.latents, pool) {
            Ok(_) => self
                .lent
                .read(|device| device.read_latents(pool, layer, block, tokens)),
            Err(error) => Ticket::ready(Err(error)),
        }
    }

    fn write_latents(
        &mut self,
        pool: &LatentPool,
        layer: usize,
        block: Block,
        record: &LatentRecord,
    ) -> Result<()> {
        owned(&self.latents, pool)?;
        self.lent
            .call(|device| device.write_latents(pool, layer, block, record))
    }

    fn compile(&mut self, program: &Program, capacity: Capacity) -> Result<Box<dyn Step>> {
        let step = self.lent.call(|device| device.compile(program, capacity))?;
        let backend = self.lent.shared().clone();
        Ok(Box::new(LentStep(StepOn { backend, step })))
    }
}

/// A step on a lent device, which is locked for its submission.
struct LentStep(StepOn);

impl Step for LentStep {
    fn operations(&self) -> &[&'static str] {
        self.0.step.operations()
    }

    fn time(&mut self, on: bool) -> Result<()> {
        self.0.step.time(on)
    }

    fn submit(&mut self, batch: &Batch) -> Result<Ticket<StepOutput>> {
        let (backend, ticket) = (self.0.backend.clone(), self.0.submit(batch)?);
        Ok(Ticket::new(async move { backend.noted(ticket.await) }))
    }
}
