//! A backend that computes in f32 and rounds what operations write to activations. For a whole model it is the oracle of a
//! bf16 device: the remaining difference comes from the order of sums and the operands of tensor cores, not from the dtype.
//! The conformance list bounds the CPU backend's error against f64 by 1e-5, a two-hundredth of one rounding to bf16.
#![allow(unreachable_pub, missing_docs, dead_code, clippy::unwrap_used)]

use kimi_linear::backend::*;
use kimi_linear::config::Dtype;

use crate::wrapped::{Part, Wrap, Wrapped};

/// Rounds the outputs of every operation.
#[derive(Clone)]
pub struct Rounded {
    precision: Dtype,
    /// Rounds where the CUDA backend stores: latents are rounded too, and a fused KDA block stores no convolved row.
    as_cuda: bool,
}

impl Rounded {
    /// Every activation rounded to this precision, in which latents are cached too: the list's oracle uses them as operands
    /// of the device's precision.
    pub fn activations(inner: Box<dyn Backend>, precision: Dtype) -> Wrapped<Self> {
        let rounded = Self {
            precision,
            as_cuda: false,
        };
        Wrapped::new(inner, rounded)
            .computing_in(precision)
            .caching_in(precision)
    }

    /// Everything that the CUDA backend stores is rounded to bf16.
    pub fn as_cuda(inner: Box<dyn Backend>) -> Wrapped<Self> {
        let rounded = Self {
            precision: Dtype::Bf16,
            as_cuda: true,
        };
        Wrapped::new(inner, rounded).computing_in(Dtype::Bf16)
    }

    /// One operation that is not a block; `kept` stays in registers.
    fn part(&self, op: &Op, kept: Option<Tensor>) -> Part {
        let precision = self.precision;
        if let (true, Op::MlaAppend(append)) = (self.as_cuda, op) {
            let append = *append;
            return Part::after(op.clone(), move |backend, batch| {
                round_latents(backend, &append, batch, precision)
            });
        }
        let mut written = op.operands().writes;
        written.retain(|tensor| tensor.element == Element::Activation && kept != Some(*tensor));
        Part::after(op.clone(), move |backend, batch| {
            let mut tensors = written.iter();
            tensors.try_for_each(|tensor| round_rows(backend, *tensor, batch, precision))
        })
    }
}

impl Wrap for Rounded {
    fn parts(&mut self, op: &Op, _backend: &mut dyn Backend) -> Result<Vec<Part>> {
        let kept = match op {
            Op::KdaBlock(block) if self.as_cuda => Some(block.qkv_conv),
            _ => None,
        };
        let whole = Program::from_iter([op.clone()]).expanded(|_| false);
        Ok(whole.ops.iter().map(|op| self.part(op, kept)).collect())
    }
}

fn round(values: &[f32], precision: Dtype) -> Vec<f32> {
    let round = |x: &f32| match precision {
        Dtype::F32 => *x,
        Dtype::F16 => half::f16::from_f32(*x).to_f32(),
        Dtype::Bf16 => half::bf16::from_f32(*x).to_f32(),
    };
    values.iter().map(round).collect()
}

/// Rounds a tensor's rows of this batch.
fn round_rows(
    backend: &mut dyn Backend,
    tensor: Tensor,
    batch: &Batch,
    precision: Dtype,
) -> Result<()> {
    let rows = match tensor.rows {
        Rows::Tokens => batch.tokens.len(),
        Rows::Outputs => batch.outputs.len(),
    };
    let values = backend.read_tensor(tensor, rows).wait()?;
    let values = round(values.as_f32().unwrap(), precision);
    backend.write_tensor(tensor, &TensorValues::F32(values))
}

/// Rounds the latents of a batch's sequences; those of earlier tokens are rounded already and do not change.
pub fn round_latents(
    backend: &mut dyn Backend,
    append: &MlaAppend,
    batch: &Batch,
    precision: Dtype,
) -> Result<()> {
    let (pool, layer) = (&append.pool, append.layer);
    let block_tokens = pool.layout.block_tokens;
    for segment in &batch.segments {
        let end = segment.position + segment.length;
        for (i, block) in segment.blocks.iter().enumerate() {
            let tokens = end.saturating_sub(i * block_tokens).min(block_tokens);
            let record = backend.read_latents(pool, layer, *block, tokens).wait()?;
            let rows = round(&record.to_f32(), precision);
            let record = LatentRecord::from_f32(record.latent, record.rope, &rows);
            backend.write_latents(pool, layer, *block, &record)?;
        }
    }
    Ok(())
}
