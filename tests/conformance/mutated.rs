//! A backend with one bug planted in it, wrapped around a real one.
//!
//! A step is cut in segments around the operation that has the bug. Between them the wrapper edits what the operation
//! reads or has written, or the batch that it sees, through the same trait; so a bug that would sit inside a kernel can
//! be planted in any backend without touching it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use kimi_linear::backend::*;

use crate::bugs::Bug;

type Shared = Arc<Mutex<Box<dyn Backend>>>;

/// Edits made before or after an operation.
pub(crate) type Edit = Box<dyn Fn(&mut dyn Backend, &Batch) -> Result<()> + Send>;

/// A change to the batch that an operation sees.
pub(crate) type Adjust = fn(&mut Batch);

/// The backend with the bug.
pub(crate) struct Mutated {
    inner: Shared,
    device: Device,
    bug: Bug,
    sources: Arc<Mutex<HashMap<u32, WeightSource>>>,
}

impl Mutated {
    pub(crate) fn new(inner: Box<dyn Backend>, bug: Bug) -> Self {
        Self {
            device: inner.device().clone(),
            inner: Arc::new(Mutex::new(inner)),
            bug,
            sources: Arc::default(),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Box<dyn Backend>> {
        self.inner.lock().unwrap()
    }
}

impl Backend for Mutated {
    fn device(&self) -> &Device {
        &self.device
    }

    fn shard(&self) -> Shard {
        self.inner().shard()
    }

    fn weight(&mut self, source: WeightSource) -> Result<Weight> {
        let weight = self.inner().weight(source.clone())?;
        self.sources.lock().unwrap().insert(weight.id, source);
        Ok(weight)
    }

    fn tensor(
        &mut self,
        rows: Rows,
        capacity: usize,
        width: usize,
        element: Element,
    ) -> Result<Tensor> {
        self.inner().tensor(rows, capacity, width, element)
    }

    fn write_tensor(&mut self, tensor: Tensor, values: &TensorValues) -> Result<()> {
        self.inner().write_tensor(tensor, values)
    }

    fn read_tensor(&mut self, tensor: Tensor, rows: usize) -> Ticket<TensorValues> {
        self.inner().read_tensor(tensor, rows)
    }

    fn state_pool(&mut self, layout: StateLayout) -> Result<StatePool> {
        self.inner().state_pool(layout)
    }

    fn latent_pool(&mut self, layout: LatentLayout) -> Result<LatentPool> {
        self.inner().latent_pool(layout)
    }

    fn read_state(&mut self, pool: &StatePool, layer: usize, slot: Slot) -> Ticket<StateRecord> {
        self.inner().read_state(pool, layer, slot)
    }

    fn write_state(
        &mut self,
        pool: &StatePool,
        layer: usize,
        slot: Slot,
        record: &StateRecord,
    ) -> Result<()> {
        self.inner().write_state(pool, layer, slot, record)
    }

    fn read_latents(
        &mut self,
        pool: &LatentPool,
        layer: usize,
        block: Block,
        tokens: usize,
    ) -> Ticket<LatentRecord> {
        self.inner().read_latents(pool, layer, block, tokens)
    }

    fn write_latents(
        &mut self,
        pool: &LatentPool,
        layer: usize,
        block: Block,
        record: &LatentRecord,
    ) -> Result<()> {
        self.inner().write_latents(pool, layer, block, record)
    }

    fn step(&mut self, capacity: Capacity) -> Result<Box<dyn Step>> {
        let step = self.inner().step(capacity)?;
        Ok(Box::new(MutatedStep {
            inner: Arc::clone(&self.inner),
            bug: self.bug,
            sources: Arc::clone(&self.sources),
            capacity,
            segments: vec![Segment::new(step)],
            vocabulary: None,
        }))
    }
}

/// Some operations of a step, with what is done before and after them.
pub(crate) struct Segment {
    pub(crate) step: Box<dyn Step>,
    pub(crate) before: Vec<Edit>,
    pub(crate) after: Vec<Edit>,
    pub(crate) adjust: Option<Adjust>,
}

impl Segment {
    fn new(step: Box<dyn Step>) -> Self {
        Self {
            step,
            before: Vec::new(),
            after: Vec::new(),
            adjust: None,
        }
    }
}

/// A step with the bug.
pub(crate) struct MutatedStep {
    pub(crate) inner: Shared,
    pub(crate) bug: Bug,
    pub(crate) sources: Arc<Mutex<HashMap<u32, WeightSource>>>,
    pub(crate) capacity: Capacity,
    pub(crate) segments: Vec<Segment>,
    pub(crate) vocabulary: Option<usize>,
}

impl MutatedStep {
    pub(crate) fn last(&mut self) -> &mut dyn Step {
        &mut *self.segments.last_mut().unwrap().step
    }

    fn cut(&mut self) -> Result<()> {
        let step = self.inner.lock().unwrap().step(self.capacity)?;
        self.segments.push(Segment::new(step));
        Ok(())
    }

    /// Records an operation in a segment of its own, with edits around it.
    fn around(
        &mut self,
        record: impl FnOnce(&mut dyn Step) -> Result<()>,
        before: Option<Edit>,
        after: Option<Edit>,
        adjust: Option<Adjust>,
    ) -> Result<()> {
        self.cut()?;
        record(self.last())?;
        let segment = self.segments.last_mut().unwrap();
        segment.before.extend(before);
        segment.after.extend(after);
        segment.adjust = adjust;
        self.cut()
    }

    pub(crate) fn before(
        &mut self,
        edit: impl Fn(&mut dyn Backend, &Batch) -> Result<()> + Send + 'static,
        record: impl FnOnce(&mut dyn Step) -> Result<()>,
    ) -> Result<()> {
        self.around(record, Some(Box::new(edit)), None, None)
    }

    pub(crate) fn after(
        &mut self,
        record: impl FnOnce(&mut dyn Step) -> Result<()>,
        edit: impl Fn(&mut dyn Backend, &Batch) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        self.around(record, None, Some(Box::new(edit)), None)
    }

    pub(crate) fn adjusted(
        &mut self,
        adjust: Adjust,
        record: impl FnOnce(&mut dyn Step) -> Result<()>,
    ) -> Result<()> {
        self.around(record, None, None, Some(adjust))
    }

    /// A weight with other bytes in each row.
    pub(crate) fn altered(
        &self,
        weight: Weight,
        alter: impl Fn(&mut [u8], usize),
    ) -> Result<Weight> {
        let mut source = self.sources.lock().unwrap()[&weight.id].clone();
        let (size, row) = (
            source.format.size(),
            source.stored_columns * source.format.size(),
        );
        for part in &mut source.parts {
            let mut bytes = part.to_vec();
            bytes.chunks_exact_mut(row).for_each(|row| alter(row, size));
            // Copied once more: `Bytes` keeps the vector's allocation, which is aligned to 8 at least.
            *part = Bytes::from(bytes);
        }
        self.inner.lock().unwrap().weight(source)
    }
}
