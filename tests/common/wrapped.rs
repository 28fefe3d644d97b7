//! A backend around another one that changes programs before they are compiled, and edits memory between operations.
//!
//! A [`Wrap`] is a function from an operation to parts: operations with edits before and after them, or with another batch.
//! Parts without edits are compiled together; each other part is a step of its own. In this way a kernel's bug can be planted
//! in any backend without changing the backend, and a rounding or a comparison can be added after any operation.
#![allow(unreachable_pub, missing_docs, dead_code, clippy::unwrap_used)]

use std::sync::{Arc, Mutex, MutexGuard};

use kimi_linear::backend::*;
use kimi_linear::config::Dtype;

pub type Shared = Arc<Mutex<Box<dyn Backend>>>;

/// An edit of memory on the device, before or after an operation.
pub type Edit = Box<dyn Fn(&mut dyn Backend, &Batch) -> Result<()> + Send>;

/// A change to an operation's batch.
pub type Adjust = fn(&mut Batch);

/// Operations, with edits before and after them.
#[derive(Default)]
pub struct Part {
    pub ops: Vec<Op>,
    pub before: Option<Edit>,
    pub after: Option<Edit>,
    pub adjust: Option<Adjust>,
}

impl Part {
    /// An unchanged operation.
    pub fn plain(op: impl Into<Op>) -> Self {
        Self {
            ops: vec![op.into()],
            ..Self::default()
        }
    }

    /// An operation after an edit.
    pub fn before(
        edit: impl Fn(&mut dyn Backend, &Batch) -> Result<()> + Send + 'static,
        op: impl Into<Op>,
    ) -> Self {
        Self {
            before: Some(Box::new(edit)),
            ..Self::plain(op)
        }
    }

    /// An operation and then an edit.
    pub fn after(
        op: impl Into<Op>,
        edit: impl Fn(&mut dyn Backend, &Batch) -> Result<()> + Send + 'static,
    ) -> Self {
        Self {
            after: Some(Box::new(edit)),
            ..Self::plain(op)
        }
    }

    /// An operation with another batch.
    pub fn adjusted(adjust: Adjust, op: impl Into<Op>) -> Self {
        Self {
            adjust: Some(adjust),
            ..Self::plain(op)
        }
    }

    fn is_plain(&self) -> bool {
        self.before.is_none() && self.after.is_none() && self.adjust.is_none()
    }
}

/// The functions of a wrapper.
pub trait Wrap: Clone + Send + 'static {
    /// The parts that replace an operation.
    fn parts(&mut self, op: &Op, backend: &mut dyn Backend) -> Result<Vec<Part>>;

    /// A weight that was loaded.
    fn took(&mut self, _weight: Weight, _source: &WeightSource) {}

    /// Changes a batch before it is submitted, or refuses it.
    fn batch(&self, _batch: &mut Batch) -> Result<()> {
        Ok(())
    }

    /// Called with the names of a step's operations before it is submitted.
    fn submitting(&self, _operations: &[&'static str]) {}

    /// Changes the result of a submission.
    fn output(&self, _output: &mut StepOutput) {}

    /// Whether the engine may submit a step before the last one is known.
    fn is_asynchronous(&self) -> bool {
        false
    }
}

pub struct Wrapped<W> {
    inner: Shared,
    device: Device,
    wrap: W,
}

impl<W: Wrap> Wrapped<W> {
    pub fn new(inner: Box<dyn Backend>, wrap: W) -> Self {
        Self {
            device: inner.device().clone(),
            inner: Arc::new(Mutex::new(inner)),
            wrap,
        }
    }

    /// The same, reporting another precision.
    pub fn computing_in(mut self, precision: Dtype) -> Self {
        self.device.precision = precision;
        self
    }

    /// Reports this dtype as the default for latents.
    pub fn caching_in(mut self, cache: Dtype) -> Self {
        self.device.cache = cache;
        self
    }

    fn inner(&self) -> MutexGuard<'_, Box<dyn Backend>> {
        self.inner.lock().unwrap()
    }
}

/// Methods that are passed on unchanged.
macro_rules! hand_on {
    ($($name:ident($($argument:ident: $kind:ty),*) -> $result:ty;)*) => {
        $(fn $name(&mut self, $($argument: $kind),*) -> $result {
            self.inner().$name($($argument),*)
        })*
    };
}

impl<W: Wrap> Backend for Wrapped<W> {
    fn device(&self) -> &Device {
        &self.device
    }

    fn is_asynchronous(&self) -> bool {
        self.wrap.is_asynchronous()
    }

    fn ranks(&self) -> usize {
        self.inner().ranks()
    }

    fn memory(&self) -> MemoryUse {
        self.inner().memory()
    }

    fn weight(&mut self, source: WeightSource) -> Result<Weight> {
        let weight = self.inner().weight(source.clone())?;
        self.wrap.took(weight, &source);
        Ok(weight)
    }

    hand_on! {
        recover() -> Result<()>;
        split_tensor(rows: Rows, capacity: usize, width: usize, element: Element) -> Result<Tensor>;
        random_weight(weight: RandomWeight) -> Result<Weight>;
        release(weight: Weight) -> Result<()>;
        resize_states(pool: &StatePool, slots: usize) -> Result<StatePool>;
        resize_latents(pool: &LatentPool, blocks: usize) -> Result<LatentPool>;
        release_states(pool: StatePool) -> Result<()>;
        release_latents(pool: LatentPool) -> Result<()>;
        place(layer: usize, home: &LayerHome, caches: Caches) -> Result<()>;
        fill_states(pool: &StatePool, random: Random) -> Result<()>;
        fill_latents(pool: &LatentPool, random: Random) -> Result<()>;
        tensor(rows: Rows, capacity: usize, width: usize, element: Element) -> Result<Tensor>;
        write_tensor(tensor: Tensor, values: &TensorValues) -> Result<()>;
        read_tensor(tensor: Tensor, rows: usize) -> Ticket<TensorValues>;
        state_pool(layout: StateLayout) -> Result<StatePool>;
        latent_pool(layout: LatentLayout) -> Result<LatentPool>;
        read_state(pool: &StatePool, layer: usize, slot: Slot) -> Ticket<StateRecord>;
        write_state(pool: &StatePool, layer: usize, slot: Slot, record: &StateRecord) -> Result<()>;
        read_latents(pool: &LatentPool, layer: usize, block: Block, tokens: usize) -> Ticket<LatentRecord>;
        write_latents(pool: &LatentPool, layer: usize, block: Block, record: &LatentRecord) -> Result<()>;
    }

    fn compile(&mut self, program: &Program, capacity: Capacity) -> Result<Box<dyn Step>> {
        let mut inner = self.inner.lock().unwrap();
        let mut parts: Vec<Part> = Vec::new();
        for op in &program.ops {
            for part in self.wrap.parts(op, &mut **inner)? {
                match parts.last_mut() {
                    Some(last) if last.is_plain() && part.is_plain() => last.ops.extend(part.ops),
                    _ => parts.push(part),
                }
            }
        }
        let mut compiled = Vec::new();
        for mut part in parts {
            let ops = Program::from_iter(std::mem::take(&mut part.ops));
            compiled.push((inner.compile(&ops, capacity)?, part));
        }
        Ok(Box::new(WrappedStep {
            inner: Arc::clone(&self.inner),
            wrap: self.wrap.clone(),
            names: compiled
                .iter()
                .flat_map(|(step, _)| step.operations().to_vec())
                .collect(),
            parts: compiled,
        }))
    }
}

struct WrappedStep<W> {
    inner: Shared,
    wrap: W,
    names: Vec<&'static str>,
    parts: Vec<(Box<dyn Step>, Part)>,
}

impl<W: Wrap> Step for WrappedStep<W> {
    fn operations(&self) -> &[&'static str] {
        &self.names
    }

    fn time(&mut self, on: bool) -> Result<()> {
        self.parts
            .iter_mut()
            .try_for_each(|(step, _)| step.time(on))
    }

    fn submit(&mut self, batch: &Batch) -> Result<Ticket<StepOutput>> {
        self.wrap.submitting(&self.names);
        let mut batch = batch.clone();
        self.wrap.batch(&mut batch)?;
        let mut output = StepOutput::default();
        for (step, part) in &mut self.parts {
            let mut seen = batch.clone();
            if let Some(edit) = &part.before {
                edit(&mut **self.inner.lock().unwrap(), &seen)?;
            }
            if let Some(adjust) = part.adjust {
                adjust(&mut seen);
            }
            let came = step.submit(&seen)?.wait()?;
            if let Some(edit) = &part.after {
                edit(&mut **self.inner.lock().unwrap(), &batch)?;
            }
            output.choices.extend(came.choices);
            output.draws.extend(came.draws);
            output.logits.extend(came.logits);
            output.probes.extend(came.probes);
            output.milliseconds.extend(came.milliseconds);
        }
        self.wrap.output(&mut output);
        Ok(Ticket::ready(Ok(output)))
    }
}
