//! The oracle of a bf16 device over a whole model: the CPU backend in f32, its activations rounded to bf16 where the CUDA
//! backend stores them. What then remains between the two is the order of sums and the operands of tensor cores, not the
//! dtype. The conformance list holds the CPU backend to f64 within 1e-5, a two-hundredth of one rounding to bf16.
#![allow(unreachable_pub, missing_docs, clippy::unwrap_used)]

use std::sync::{Arc, Mutex};

use half::bf16;
use kimi_linear::backend::*;

pub struct Rounded {
    inner: Arc<Mutex<Box<dyn Backend>>>,
    device: Device,
}

impl Rounded {
    pub fn new(inner: Box<dyn Backend>) -> Self {
        let device = Device {
            precision: Precision::Bf16,
            ..inner.device().clone()
        };
        Self {
            inner: Arc::new(Mutex::new(inner)),
            device,
        }
    }
}

/// Methods handed on as they are.
macro_rules! hand_on {
    ($($name:ident($($argument:ident: $kind:ty),*) -> $result:ty;)*) => {
        $(fn $name(&mut self, $($argument: $kind),*) -> $result {
            self.inner.lock().unwrap().$name($($argument),*)
        })*
    };
}

impl Backend for Rounded {
    fn device(&self) -> &Device {
        &self.device
    }

    fn shard(&self) -> Shard {
        self.inner.lock().unwrap().shard()
    }

    hand_on! {
        weight(source: WeightSource) -> Result<Weight>;
        random_weight(weight: RandomWeight) -> Result<Weight>;
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

    fn step(&mut self, capacity: Capacity) -> Result<Box<dyn Step>> {
        Ok(Box::new(RoundedStep {
            inner: Arc::clone(&self.inner),
            capacity,
            operations: Vec::new(),
            fused: None,
        }))
    }
}

/// What is rounded after an operation.
enum Written {
    Tensors(Vec<Tensor>),
    Latents(LatentPool, usize),
}

/// Every operation in a step of its own, with what it writes.
struct RoundedStep {
    inner: Arc<Mutex<Box<dyn Backend>>>,
    capacity: Capacity,
    operations: Vec<(Box<dyn Step>, Written)>,
    /// A tensor inside a KDA layer's block that a fused kernel never stores.
    fused: Option<Tensor>,
}

fn round(values: &mut [f32]) {
    for value in values {
        *value = bf16::from_f32(*value).to_f32();
    }
}

impl RoundedStep {
    fn record(
        &mut self,
        record: impl FnOnce(&mut dyn Step) -> Result<()>,
        written: Written,
    ) -> Result<()> {
        let mut step = self.inner.lock().unwrap().step(self.capacity)?;
        record(&mut *step)?;
        self.operations.push((step, written));
        Ok(())
    }

    /// Records an operation that writes these tensors, but for those that only pass through registers.
    fn writing(
        &mut self,
        record: impl FnOnce(&mut dyn Step) -> Result<()>,
        mut tensors: Vec<Tensor>,
    ) -> Result<()> {
        tensors.retain(|tensor| {
            tensor.element == Element::Activation && self.fused.is_none_or(|fused| fused != *tensor)
        });
        self.record(record, Written::Tensors(tensors))
    }
}

fn round_written(backend: &mut dyn Backend, written: &Written, batch: &Batch) -> Result<()> {
    match written {
        Written::Tensors(tensors) => {
            for tensor in tensors {
                let rows = match tensor.rows {
                    Rows::Tokens => batch.tokens.len(),
                    Rows::Outputs => batch.outputs.len(),
                };
                let values = backend.read_tensor(*tensor, rows).wait()?;
                let mut values = values.as_f32().unwrap().to_vec();
                round(&mut values);
                backend.write_tensor(*tensor, &TensorValues::F32(values))?;
            }
        }
        Written::Latents(pool, layer) => {
            let block_tokens = pool.layout.block_tokens;
            for piece in &batch.pieces {
                let end = piece.position + piece.length;
                for (i, block) in piece.blocks.iter().enumerate() {
                    let tokens = end.saturating_sub(i * block_tokens).min(block_tokens);
                    let mut record = backend.read_latents(pool, *layer, *block, tokens).wait()?;
                    round(&mut record.rows);
                    backend.write_latents(pool, *layer, *block, &record)?;
                }
            }
        }
    }
    Ok(())
}

/// Operations with the arguments that they write.
macro_rules! rounded {
    ($($name:ident($kind:ty) $(-> $output:ident)*;)*) => {
        $(fn $name(&mut self, op: $kind) -> Result<()> {
            self.writing(|step| step.$name(op), vec![$(op.$output),*])
        })*
    };
}

impl Step for RoundedStep {
    rounded! {
        embed(Embed) -> output;
        rms_norm(RmsNorm) -> output;
        linear(Linear) -> output;
        short_conv(ShortConv) -> output;
        kda_gates(KdaGates);
        kda_recurrence(KdaRecurrence) -> output;
        gated_norm(GatedNorm) -> output;
        mla_prefill(MlaAttention) -> output;
        mla_decode(MlaAttention) -> output;
        route(Route);
        experts(Experts) -> output;
        swiglu(Swiglu) -> output;
        add(Add) -> target;
        all_reduce(AllReduce) -> target;
        all_gather(AllGather) -> output;
        select(Select);
        probe(Tensor);
    }

    fn mla_append(&mut self, op: MlaAppend) -> Result<()> {
        let written = Written::Latents(op.pool, op.layer);
        self.record(|step| step.mla_append(op), written)
    }

    /// The fused kernels convolve what they read, and store no convolved row.
    fn kda_block(&mut self, block: &KdaBlock) -> Result<()> {
        self.fused = Some(block.qkv_conv);
        let recorded = block.compose(self);
        self.fused = None;
        recorded
    }

    fn operations(&self) -> &[&'static str] {
        // A list a call: this is a test, and few calls.
        let names = self.operations.iter();
        let names = names.flat_map(|(step, _)| step.operations());
        names.copied().collect::<Vec<_>>().leak()
    }

    fn submit(&mut self, batch: &Batch) -> Result<Ticket<StepOutput>> {
        let mut output = StepOutput::default();
        for (step, written) in &mut self.operations {
            let part = step.submit(batch)?.wait()?;
            output.choices.extend(part.choices);
            output.logits.extend(part.logits);
            output.probes.extend(part.probes);
            round_written(&mut **self.inner.lock().unwrap(), written, batch)?;
        }
        Ok(Ticket::ready(Ok(output)))
    }
}
