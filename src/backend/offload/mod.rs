//! A device and the host as one backend, for a model that is larger than the device's memory: the routed experts of some layers
//! stay in the host's memory, where the CPU computes them, and everything else is on the device.
//!
//! Experts are most of a model's bytes, and a token reads few of them. Weights of the host are made by the CPU backend, which reads
//! them in the mapped files without a copy. A program is cut at these experts (`lower`); what they read and their
//! results pass through the host's memory (`step`): two rows of the hidden size for each token and layer. Which layers are on the
//! host is fixed, so that a row's arithmetic does not depend on what ran before, and sums have the order of the device's own block.
//!
//! It has a single device, and does not join others ([`Backend::join`]).

mod lower;
mod step;
mod tables;

use std::sync::Arc;

use self::lower::{Part, lower};
use self::step::{DeviceStep, HostStep, OffloadStep};
use self::tables::{Located, OnHost, Tables};
use super::shared::{On, SharedBackend, Traffic};
use super::{
    Backend, Block, Capacity, ConfirmedReport, Device, Element, LatentLayout, LatentPool,
    LatentRecord, MemoryUse, Op, Place, Program, Random, RandomWeight, Result, Rows, Slot,
    StateLayout, StatePool, StateRecord, Step, Tensor, TensorValues, Ticket, Weight, WeightSource,
    check,
};
use crate::config::ModelConfig;
use crate::error::BackendError;

/// The name of the two in messages about handles.
const NAME: &str = "device and host";

/// A device that runs a model, and the host, which computes the routed experts of some layers.
pub struct Offload {
    description: Device,
    device: SharedBackend,
    host: SharedBackend,
    /// The layers whose routed experts are on the host.
    layers: Vec<usize>,
    tables: Tables,
    traffic: Arc<Traffic>,
}

impl Offload {
    /// `device` for all of a model but the routed experts of its first `count` layers with experts, and `host`, the CPU backend,
    /// for these.
    ///
    /// # Errors
    /// More layers than the model has with experts, and several devices: where they are cut depends on the whole program.
    pub fn new(
        device: Box<dyn Backend>,
        host: Box<dyn Backend>,
        config: &ModelConfig,
        count: usize,
    ) -> Result<Self> {
        let wrong = |what, expected: String, found: usize| BackendError::Shape {
            operation: NAME,
            what,
            expected,
            found: found.to_string(),
        };
        let layers: Vec<usize> = config.moe_layers().take(count).collect();
        if layers.len() < count {
            let expected = format!("at most {}, the model's layers with experts", layers.len());
            let what = "the number of layers whose experts are on the host";
            return Err(wrong(what, expected, count));
        }
        if device.device_count() > 1 {
            let what = "the number of devices beside the host";
            return Err(wrong(what, "1".to_owned(), device.device_count()));
        }
        let plural = if count == 1 { "" } else { "s" };
        let on = device.device();
        let name = format!(
            "{}, experts of {count} layer{plural} on {}",
            on.name,
            host.device().name
        );
        Ok(Self {
            description: Device { name, ..on.clone() },
            device: SharedBackend::new(device),
            host: SharedBackend::new(host),
            layers,
            tables: Tables::default(),
            traffic: Arc::default(),
        })
    }

    /// What is sent between the device and the host.
    #[must_use]
    pub fn traffic(&self) -> Arc<Traffic> {
        Arc::clone(&self.traffic)
    }

    /// Whether a weight of this place stays on the host.
    fn keeps(&self, place: &Place) -> bool {
        place.experts && self.layers.contains(&place.layer)
    }

    /// A tensor of the device.
    fn on_device(&self, tensor: Tensor) -> On {
        let backend = self.device.clone();
        On { backend, tensor }
    }

    /// The host's counterpart of a tensor of the device; layers share it as they share the device's.
    fn on_host(&mut self, tensor: Tensor) -> Result<On> {
        let of_host = match self.tables.copy_of(tensor) {
            Some(of_host) => of_host,
            None => {
                let Tensor {
                    rows,
                    capacity,
                    width,
                    element,
                    ..
                } = tensor;
                let mut host = self.host.lock();
                let of_host = host.tensor(rows, capacity, width, element)?;
                self.tables.copied.push((tensor, of_host));
                of_host
            }
        };
        Ok(On {
            backend: self.host.clone(),
            tensor: of_host,
        })
    }

    /// Compiles a program of the device, and adds the names of its operations.
    fn compile_device(
        &self,
        program: &Program,
        capacity: Capacity,
        names: &mut Vec<&'static str>,
    ) -> Result<DeviceStep> {
        let step = self.device.lock().compile(program, capacity)?;
        names.extend(step.operations());
        Ok(DeviceStep {
            step,
            draws: program.ops.iter().any(|op| matches!(op, Op::Sample(_))),
        })
    }

    /// Compiles experts for the host, and adds the names of operations.
    fn compile_host(
        &mut self,
        op: &Op,
        beside: &Program,
        capacity: Capacity,
        names: &mut Vec<&'static str>,
    ) -> Result<HostStep> {
        let operands = op.operands();
        let mut inputs = Vec::with_capacity(operands.reads.len());
        for tensor in operands.reads {
            inputs.push((self.on_device(tensor), self.on_host(tensor)?));
        }
        let [output] = operands.writes[..] else {
            return Err(BackendError::Unsupported {
                backend: NAME,
                what: format!("{} with several results", op.name()),
            });
        };
        let output = (self.on_host(output)?, self.on_device(output));
        let program = Program::from_iter([op.relocated(&OnHost(&self.tables))?]);
        let step = self.host.lock().compile(&program, capacity)?;
        names.push("send");
        names.extend(step.operations());
        let beside = match beside.ops.is_empty() {
            true => None,
            false => Some(self.compile_device(beside, capacity, names)?),
        };
        Ok(HostStep {
            step,
            inputs,
            output,
            beside,
        })
    }
}

impl Backend for Offload {
    fn device(&self) -> &Device {
        &self.description
    }

    // A step waits for the device at each layer whose experts are on the host: nothing is left to run when a submission returns, and a
    // step that is submitted ahead would only come later. So `is_asynchronous` stays false.

    fn recover(&mut self) -> Result<()> {
        self.device.lock().recover()?;
        self.host.lock().recover()
    }

    fn free_memory(&mut self) -> Option<u64> {
        self.device.lock().free_memory()
    }

    fn weight(&mut self, source: WeightSource) -> Result<Weight> {
        let handle = source.handle(0);
        let located = match self.keeps(&source.place) {
            true => Located::Host(self.host.lock().weight(source)?),
            false => Located::Device(self.device.lock().weight(source)?),
        };
        let weights = &mut self.tables.weights;
        Ok(weights.add(located, |id| Weight { id, ..handle }))
    }

    fn copies_weight(&self, place: &Place) -> bool {
        let on = match self.keeps(place) {
            true => &self.host,
            false => &self.device,
        };
        on.lock().copies_weight(place)
    }

    fn random_weight(&mut self, weight: RandomWeight) -> Result<Weight> {
        let handle = weight.handle(0);
        let located = match self.keeps(&weight.place) {
            true => Located::Host(self.host.lock().random_weight(weight)?),
            false => Located::Device(self.device.lock().random_weight(weight)?),
        };
        let weights = &mut self.tables.weights;
        Ok(weights.add(located, |id| Weight { id, ..handle }))
    }

    fn memory(&self) -> MemoryUse {
        self.device.lock().memory() + self.host.lock().memory()
    }

    fn release(&mut self, weight: Weight) -> Result<()> {
        match *self.tables.weights.get(NAME, weight)? {
            Located::Device(weight) => self.device.lock().release(weight)?,
            Located::Host(weight) => self.host.lock().release(weight)?,
        }
        self.tables.weights.release(NAME, weight)
    }

    fn resize_states(&mut self, pool: &StatePool, slots: usize) -> Result<StatePool> {
        self.device.lock().resize_states(pool, slots)
    }

    fn resize_latents(&mut self, pool: &LatentPool, blocks: usize) -> Result<LatentPool> {
        self.device.lock().resize_latents(pool, blocks)
    }

    fn release_states(&mut self, pool: StatePool) -> Result<()> {
        self.device.lock().release_states(pool)
    }

    fn release_latents(&mut self, pool: LatentPool) -> Result<()> {
        self.device.lock().release_latents(pool)
    }

    fn fill_states(&mut self, pool: &StatePool, random: Random) -> Result<()> {
        self.device.lock().fill_states(pool, random)
    }

    fn fill_latents(&mut self, pool: &LatentPool, random: Random) -> Result<()> {
        self.device.lock().fill_latents(pool, random)
    }

    fn tensor(
        &mut self,
        rows: Rows,
        capacity: usize,
        width: usize,
        element: Element,
    ) -> Result<Tensor> {
        self.device.lock().tensor(rows, capacity, width, element)
    }

    fn split_tensor(
        &mut self,
        rows: Rows,
        capacity: usize,
        width: usize,
        element: Element,
    ) -> Result<Tensor> {
        let mut device = self.device.lock();
        device.split_tensor(rows, capacity, width, element)
    }

    fn write_tensor(&mut self, tensor: Tensor, values: &TensorValues) -> Result<()> {
        self.device.lock().write_tensor(tensor, values)
    }

    fn read_tensor(&mut self, tensor: Tensor, rows: usize) -> Ticket<TensorValues> {
        self.device.lock().read_tensor(tensor, rows)
    }

    fn state_pool(&mut self, layout: StateLayout) -> Result<StatePool> {
        self.device.lock().state_pool(layout)
    }

    fn latent_pool(&mut self, layout: LatentLayout) -> Result<LatentPool> {
        self.device.lock().latent_pool(layout)
    }

    fn read_state(&mut self, pool: &StatePool, layer: usize, slot: Slot) -> Ticket<StateRecord> {
        self.device.lock().read_state(pool, layer, slot)
    }

    fn write_state(
        &mut self,
        pool: &StatePool,
        layer: usize,
        slot: Slot,
        record: &StateRecord,
    ) -> Result<()> {
        self.device.lock().write_state(pool, layer, slot, record)
    }

    fn read_latents(
        &mut self,
        pool: &LatentPool,
        layer: usize,
        block: Block,
        tokens: usize,
    ) -> Ticket<LatentRecord> {
        self.device.lock().read_latents(pool, layer, block, tokens)
    }

    fn write_latents(
        &mut self,
        pool: &LatentPool,
        layer: usize,
        block: Block,
        record: &LatentRecord,
    ) -> Result<()> {
        self.device.lock().write_latents(pool, layer, block, record)
    }

    fn compile(&mut self, program: &Program, capacity: Capacity) -> Result<Box<dyn Step>> {
        let demands = check::program(program, &capacity, 1)?;
        let mut names = Vec::new();
        let mut parts = Vec::new();
        for part in lower(program, &self.tables)? {
            parts.push(match part {
                Part::Device(program) => {
                    step::Part::Device(self.compile_device(&program, capacity, &mut names)?)
                }
                Part::Host { op, beside } => {
                    step::Part::Host(self.compile_host(&op, &beside, capacity, &mut names)?)
                }
            });
        }
        self.traffic.note(parts.iter().flat_map(step::Part::places));
        Ok(Box::new(OffloadStep {
            traffic: Arc::clone(&self.traffic),
            capacity,
            demands,
            parts,
            names,
            timed: false,
        }))
    }

    fn report_confirmed(&mut self, report: ConfirmedReport) {
        self.device.lock().report_confirmed(report);
    }
}
